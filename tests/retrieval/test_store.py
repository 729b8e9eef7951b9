"""The local-feature store: what goes in comes out, whatever the codec, the ids and the shards."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emd_retrieval.retrieval import LocalFeatureStore, StoreDamagedError, StoreLockedError
from emd_retrieval.retrieval.store import CODECS, StoreManifest
from emd_retrieval.retrieval.store.codecs import encode, split

N, D, G = 5, 8, 6


@pytest.fixture
def path(tmp_path):
    return tmp_path / "birds.store"


def names(count, kind="string"):
    numbers = [7 * i - 20 for i in range(count)]
    return [f"wren/{i} ü\n.jpg" for i in numbers] if kind == "string" else numbers


def filled(path, generator, count=23, batch=4, *, ids="string", nodes=N, **changes):
    """A store and what was put into it: ids, sets, global vectors."""
    sizes = torch.randint(1, 7, (count,), generator=generator).tolist()
    sets = [torch.randn(nodes or size, D, generator=generator) for size in sizes]
    vectors = torch.randn(count, G, generator=generator)
    keys = names(count, ids)
    options = {"codec": "float32", "shard_rows": 7, "extractor": {"name": "fcn"}, **changes}
    with LocalFeatureStore.create(
        path, channels=D, nodes=nodes, global_channels=G, ids=ids, **options
    ) as writer:
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            writer.append(keys[part], sets[part], vectors[part])
    return keys, sets, vectors


def padded(sets):
    return torch.nn.utils.rnn.pad_sequence(sets, batch_first=True)


@pytest.mark.parametrize("ids", ["string", "int64"])
@pytest.mark.parametrize("nodes", [N, None], ids=["fixed", "varying"])
@pytest.mark.parametrize("shard_rows", [7, 1000])
def test_what_goes_in_comes_out(path, generator, ids, nodes, shard_rows):
    keys, sets, vectors = filled(path, generator, ids=ids, nodes=nodes, shard_rows=shard_rows)
    store = LocalFeatureStore.open(path, verify=True)
    assert len(store) == len(keys)
    assert list(store.ids) == keys
    rows = torch.randperm(len(keys), generator=generator)[:11]
    expected = [sets[row] for row in rows.tolist()]
    assert torch.equal(store.nodes(rows), padded(expected))
    assert store.counts(rows).tolist() == [len(part) for part in expected]
    assert torch.equal(store.global_vectors(rows), vectors[rows])
    assert torch.equal(store.global_vectors(), vectors)
    assert torch.equal(store.rows_of([keys[row] for row in rows.tolist()]), rows)
    assert store.contains([keys[0], names(50, ids)[40]]).tolist() == [True, False]


def test_repeated_and_no_rows(path, generator):
    _, sets, _ = filled(path, generator)
    store = LocalFeatureStore.open(path)
    assert torch.equal(store.nodes([9, 9, 0]), torch.stack([sets[9], sets[9], sets[0]]))
    assert store.nodes([]).shape == (0, N, D)
    assert store.ids_at([]) == []
    assert store.rows_of([]).tolist() == []


def test_an_empty_store(path):
    LocalFeatureStore.create(path, channels=D, nodes=None, global_channels=G).close()
    store = LocalFeatureStore.open(path, verify=True)
    assert len(store) == 0
    assert len(store.ids) == 0
    assert store.nodes().shape == (0, 0, D)
    assert store.global_vectors().shape == (0, G)
    with pytest.raises(ValueError, match=r"ids: 1 of 1 are not in the store birds.store \(0 sets"):
        store.rows_of([3])


finite32 = st.floats(-60000, 60000, width=32)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(nodes=arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=finite32))
def test_the_error_of_each_codec_is_bounded(codec, nodes):
    codes, scales = split(encode(nodes, codec)[None], codec, nodes.shape[1])
    decoded = codes[0].astype(np.float64) * (1 if scales is None else scales[0][:, None])
    error, size = np.abs(decoded - nodes), np.abs(nodes.astype(np.float64))
    if codec == "float32":
        bound = np.zeros_like(size)
    elif codec == "float16":
        bound = np.maximum(size / 2048, 2.0**-25)
    else:
        # Half a step of the node, and float32's own rounding.
        step = size.max(axis=1, keepdims=True) / 127
        bound = np.broadcast_to(step * (0.5 + 1e-4) + 1e-35, size.shape)
    assert (error <= bound).all()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_order_of_appends_gives_the_same_store(tmp_path_factory, data):
    """Batches, shards and new sessions leave no trace in what is read."""
    folder = tmp_path_factory.mktemp("store")
    texts = data.draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=9))
    shard_rows = data.draw(st.integers(1, 5))
    sets = torch.arange(len(texts) * N * D, dtype=torch.float32).reshape(-1, N, D)
    start = 0
    while True:
        with LocalFeatureStore.create(
            folder, channels=D, nodes=N, ids="string", codec="float32", shard_rows=shard_rows
        ) as writer:
            for _ in range(data.draw(st.integers(1, 3))):
                end = min(len(texts), start + data.draw(st.integers(1, 4)))
                writer.append(texts[start:end], sets[start:end])
                start = end
        if start == len(texts):
            break
    store = LocalFeatureStore.open(folder, verify=True)
    assert store.ids == texts
    assert torch.equal(store.nodes(), sets)
    assert store.rows_of(texts[::-1]).tolist() == list(range(len(texts)))[::-1]


@pytest.mark.parametrize("codec", CODECS)
def test_read_encoded_hands_out_codes_and_scales(path, generator, codec):
    _, sets, _ = filled(path, generator, codec=codec)
    store = LocalFeatureStore.open(path)
    encoded = store.read_encoded([3, 11])
    assert str(encoded.codes.dtype) == f"torch.{codec}"
    assert encoded.codes.shape == (2, N, D)
    assert (encoded.scales is not None) == (codec == "int8")
    decoded = encoded.decode()
    assert torch.equal(decoded, store.nodes([3, 11]))
    torch.testing.assert_close(decoded, torch.stack([sets[3], sets[11]]), atol=0.02, rtol=1e-3)
    if encoded.scales is not None:
        peak = encoded.codes.abs().amax(dim=2)
        assert (peak == 127).all(), "the largest value of a node takes the largest code"


def test_a_set_is_one_contiguous_read(path, generator):
    _, sets, _ = filled(path, generator, codec="float16")
    data = np.fromfile(path / "shard-000001" / "nodes.bin", "<f2")
    stored = data.reshape(-1, N, D)[2]
    assert np.array_equal(stored, sets[7 + 2].half().numpy())


def test_arrays_are_taken_like_tensors(path):
    sets = np.arange(2 * N * D, dtype=np.float64).reshape(2, N, D)
    with LocalFeatureStore.create(path, channels=D, nodes=N, codec="float32") as writer:
        writer.append(np.array([5, 3]), sets)
        writer.append(torch.tensor([9]), sets[:1])
    store = LocalFeatureStore.open(path)
    assert store.ids.tolist() == [5, 3, 9]
    assert np.array_equal(store.nodes([1])[0], sets[1])


@pytest.mark.parametrize("ids", ["string", "int64"])
def test_deleted_sets_are_gone_and_positions_close_up(path, generator, ids):
    keys, sets, vectors = filled(path, generator, ids=ids)
    store, other = LocalFeatureStore.open(path), LocalFeatureStore.open(path)
    store.delete([keys[3], keys[10]])
    store.delete([keys[11]])
    left = [i for i in range(len(keys)) if i not in (3, 10, 11)]
    assert len(other) == len(keys), "an open view stays as it is"
    other.refresh()
    for view in (store, other, LocalFeatureStore.open(path, verify=True)):
        assert len(view) == len(left)
        assert list(view.ids) == [keys[i] for i in left]
        assert torch.equal(view.nodes(), torch.stack([sets[i] for i in left]))
        assert torch.equal(view.global_vectors(), vectors[left])
        assert view.rows_of([keys[4], keys[-1]]).tolist() == [3, len(left) - 1]
        assert not view.contains([keys[10]]).any()
    with pytest.raises(ValueError, match="ids: 2 of 3 are not in the store"):
        store.delete([keys[0], keys[3], keys[10]])
    assert len(LocalFeatureStore.open(path)) == len(left), "a refused deletion deletes nothing"
    with pytest.raises(ValueError, match="once"):
        store.delete([keys[0], keys[0]])


def test_a_deleted_id_can_be_stored_again(path, generator):
    keys, sets, vectors = filled(path, generator, shard_rows=1000)
    store = LocalFeatureStore.open(path)
    for turn in range(1, 3):
        store.delete([keys[3]])
        with LocalFeatureStore.append_to(path) as writer:
            writer.append([keys[3]], [sets[turn]], vectors[:1])
        store.refresh()
        assert store.rows_of([keys[3]]).tolist() == [len(keys) - 1]
        assert torch.equal(store.nodes([len(keys) - 1])[0], sets[turn])


def test_strings_of_one_hash_are_told_apart(path, monkeypatch):
    from emd_retrieval.retrieval.store import shard, store

    def clash(ids):
        return np.array([len(text) for text in ids], "<u8")

    monkeypatch.setattr(shard, "id_keys", clash)
    monkeypatch.setattr(store, "id_keys", clash)
    texts = ["aa", "b", "bb", "cc", "c"]
    sets = torch.randn(len(texts), N, D)
    with LocalFeatureStore.create(path, channels=D, nodes=N, ids="string") as writer:
        writer.append(texts, sets)
    opened = LocalFeatureStore.open(path)
    assert opened.rows_of(texts).tolist() == [0, 1, 2, 3, 4]
    assert opened.contains(["dd", "d", "ddd"]).tolist() == [False] * 3


def test_readers_keep_a_consistent_view_during_append(path, generator):
    with LocalFeatureStore.create(path, channels=D, nodes=N, codec="float32") as writer:
        views = []
        for start in range(0, 60, 5):
            ids = range(start, start + 5)
            writer.append(list(ids), torch.full((5, N, D), float(start)))
            writer.commit()
            views.append((start + 5, LocalFeatureStore.open(path)))
            for count, view in views:
                assert len(view) == count
                assert view.rows_of(list(range(count))).tolist() == list(range(count))
                assert view.nodes([count - 1])[0, 0, 0] == count - 5
    assert not views[-1][1].manifest.complete
    views[0][1].refresh()
    assert len(views[0][1]) == 60
    assert views[0][1].manifest.complete


def test_appended_sets_are_seen_after_the_commit(path):
    with LocalFeatureStore.create(path, channels=D, nodes=N) as writer:
        writer.append([1], torch.ones(1, N, D))
        assert len(writer) == 1
        assert len(LocalFeatureStore.open(path)) == 0
        writer.commit()
        assert len(LocalFeatureStore.open(path)) == 1


def test_an_exception_keeps_what_was_appended_whole(path):
    def interrupted():
        with LocalFeatureStore.create(path, channels=D, nodes=N) as writer:
            writer.append([1, 2], torch.ones(2, N, D))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    store = LocalFeatureStore.open(path, verify=True)
    assert store.ids.tolist() == [1, 2]
    assert not store.manifest.complete
    LocalFeatureStore.append_to(path).close()
    assert LocalFeatureStore.open(path).manifest.complete


def test_many_ids_are_sorted_on_the_way(path, monkeypatch):
    from emd_retrieval.retrieval.store import writer as module

    monkeypatch.setattr(module, "_FRESH_IDS", (3, 8))
    order = np.random.default_rng(0).permutation(200) * 3
    with LocalFeatureStore.create(path, channels=D, nodes=N) as writer:
        for start in range(0, 200, 2):
            writer.append(order[start : start + 2], torch.ones(2, N, D))
            assert len(writer._fresh) <= 10
            with pytest.raises(ValueError, match="are in the store already"):
                writer.append(order[start // 2 : start // 2 + 1], torch.ones(1, N, D))
    store = LocalFeatureStore.open(path, verify=True)
    assert store.rows_of(order[::-1]).tolist() == list(range(200))[::-1]
    assert len(list(path.rglob("index-*.bin"))) == 1


def test_a_store_of_the_same_settings_is_continued(path, generator):
    keys, sets, vectors = filled(path, generator)
    options = {"nodes": N, "global_channels": G, "ids": "string", "codec": "float32"}
    writer = LocalFeatureStore.create(path, channels=D, extractor={"name": "fcn"}, **options)
    with writer:
        assert writer.contains(keys).all()
        writer.append(["new"], sets[:1], vectors[:1])
    assert len(LocalFeatureStore.open(path)) == len(keys) + 1
    for change, message in (
        (
            {"extractor": {"name": "grid"}},
            "extractor name: the store birds.store was written with 'fcn', ",
        ),
        ({"codec": "int8"}, "codec: the store birds.store was written with 'float32', got 'int8'"),
        ({"nodes": None}, "nodes: the store birds.store was written with 5, got None"),
    ):
        arguments = {"channels": D, "extractor": {"name": "fcn"}, **options, **change}
        with pytest.raises(ValueError, match=message):
            LocalFeatureStore.create(path, **arguments)
    LocalFeatureStore.append_to(path).close()  # no refusal left the lock behind


def test_opening_again_changes_no_byte(path, generator):
    filled(path, generator)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    LocalFeatureStore.append_to(path).close()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_store_travels_to_another_process_by_its_path(path, generator):
    _, sets, _ = filled(path, generator)
    sent = pickle.dumps(LocalFeatureStore.open(path))
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent).nodes([3])[0], sets[3])  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1], torch.ones(2, N, D)), ValueError, r"ids: expected one a set \(2\), got 1"),
        (([1, 1], torch.ones(2, N, D)), ValueError, "ids: expected each id once, got 1 twice"),
        (([7], torch.ones(1, N, D)), ValueError, "ids: 1 of 1 are in the store already: 7"),
        ((["a"], torch.ones(1, N, D)), TypeError, "ids are whole numbers"),
        (("a", torch.ones(1, N, D)), TypeError, "sequence of ids, got a single str"),
        (([1], torch.ones(1, N, D + 1)), ValueError, r"nodes: expected shape \[n, 5, 8\], got"),
        (([1], [torch.ones(N - 1, D)]), ValueError, r"nodes\[0\]: expected shape \[5, 8\], got"),
        (([1], torch.ones(1, N, D, dtype=torch.int64)), TypeError, "nodes: expected a floating"),
        (([1], torch.full((1, N, D), torch.nan)), ValueError, "nodes: expected finite values"),
        (([1], torch.full((1, N, D), 1e5)), ValueError, "float16 holds up to|float16 holds values"),
        (([1], torch.ones(1, N, D), torch.ones(1, G)), ValueError, "global_vectors: the store has"),
        (([2**63], torch.ones(1, N, D)), ValueError, "fit int64"),
    ],
)
def test_what_an_append_refuses_leaves_no_trace(path, arguments, error, message):
    with LocalFeatureStore.create(path, channels=D, nodes=N) as writer:
        writer.append([7], torch.ones(1, N, D))
        with pytest.raises(error, match=message):
            writer.append(*arguments)
        writer.append([8], torch.ones(1, N, D))
    assert LocalFeatureStore.open(path, verify=True).ids.tolist() == [7, 8]


def test_varying_sets_need_a_node(path):
    with LocalFeatureStore.create(path, channels=D, nodes=None, global_channels=G) as writer:
        with pytest.raises(ValueError, match=r"nodes\[1\]: expected at least one node"):
            writer.append([1, 2], [torch.ones(2, D), torch.ones(0, D)], torch.ones(2, G))
        with pytest.raises(ValueError, match=r"global_vectors: expected shape \[1, 6\], got none"):
            writer.append([1], [torch.ones(2, D)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([23], "rows: expected positions 0 to 22, got 23 to 23"),
        ([-1], "rows: expected positions 0 to 22, got -1 to -1"),
        ([0.5], "rows: expected positions, whole numbers"),
        ([[1]], "rows: expected positions, whole numbers"),
    ],
)
def test_rows_that_are_not_there(path, generator, rows, message):
    filled(path, generator)
    store = LocalFeatureStore.open(path)
    for read in (store.nodes, store.global_vectors, store.ids_at, store.counts):
        with pytest.raises(ValueError, match=message):
            read(rows)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: expected a positive number, got 0"),
        ({"nodes": 1.5}, ValueError, "nodes: expected a whole number, got 1.5"),
        ({"codec": "int4"}, ValueError, "codec: expected one of .*did you mean 'int8'"),
        ({"ids": "uuid"}, ValueError, "ids: expected one of int64, string"),
        ({"extractor": {"backbone": object()}}, TypeError, "extractor: expected plain JSON values"),
        ({"extractor": {"scale": float("nan")}}, TypeError, "extractor: expected plain JSON"),
        ({"shard_rows": 2**40}, ValueError, r"shard_rows: expected at most 2\*\*31"),
    ],
)
def test_settings_that_no_store_has(path, settings, error, message):
    with pytest.raises(error, match=message):
        LocalFeatureStore.create(path, **{"channels": D, "nodes": N, **settings})
    assert not path.exists()


def test_no_store_and_other_folders(tmp_path, path, generator):
    for make in (LocalFeatureStore.open, LocalFeatureStore.append_to):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            make(path)
        with pytest.raises(FileNotFoundError, match=r"no store \(store.json is missing\)"):
            make(tmp_path)
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists and is no store; it holds 'notes.txt'"):
        LocalFeatureStore.create(tmp_path, channels=D, nodes=N)
    filled(path, generator)
    store = LocalFeatureStore.open(path)
    with pytest.raises(TypeError, match="the store's ids are strings, got 3"):
        store.rows_of([3])
    with pytest.raises(ValueError, match=r"ids: 2 of 3 are not in the store .*: 'x', 'y'$"):
        store.rows_of(["x", store.ids[0], "y"])


def test_no_global_vectors(path):
    LocalFeatureStore.create(path, channels=D, nodes=N).close()
    with pytest.raises(ValueError, match="has no global vectors; create it with global_channels"):
        LocalFeatureStore.open(path).global_vectors()


def test_one_writer_at_a_time(path):
    with LocalFeatureStore.create(path, channels=D, nodes=N) as writer:
        writer.append([1], torch.ones(1, N, D))
        writer.commit()
        message = "is being written by another writer of this process"
        with pytest.raises(StoreLockedError, match=message):
            LocalFeatureStore.append_to(path)
        with pytest.raises(StoreLockedError, match=message):
            LocalFeatureStore.create(path, channels=D, nodes=N)
        with pytest.raises(StoreLockedError, match=message):
            LocalFeatureStore.open(path).delete([1])
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.append([2], torch.ones(1, N, D))
    LocalFeatureStore.open(path).delete([1])


def test_the_manifest_is_typed_and_tells_the_extractor(path, generator):
    filled(path, generator, extractor={"backbone": "resnet50", "pyramid": (3, 2, 1)})
    manifest = LocalFeatureStore.open(path).manifest
    assert manifest.extractor == {"backbone": "resnet50", "pyramid": [3, 2, 1]}
    assert (manifest.channels, manifest.nodes, manifest.codec, manifest.rows) == (
        D,
        N,
        "float32",
        23,
    )
    assert [shard.rows for shard in manifest.shards] == [7, 7, 7, 2]
    assert manifest.complete
    written = json.loads((path / "store.json").read_text())
    assert written["version"] == 1


def test_reading_touches_only_its_rows(path):
    """Every other row is destroyed, and nobody notices before verify()."""
    with LocalFeatureStore.create(path, channels=D, nodes=N, codec="float32") as writer:
        writer.append(list(range(50)), torch.ones(50, N, D))
    file = path / "shard-000000" / "nodes.bin"
    size = N * D * 4
    data = bytearray(b"\xff" * (50 * size))
    data[7 * size : 8 * size] = np.ones(N * D, "<f4").tobytes()
    file.write_bytes(data)
    store = LocalFeatureStore.open(path)
    assert torch.equal(store.nodes([7]), torch.ones(1, N, D))
    with pytest.raises(StoreDamagedError, match=r"nodes.bin was altered: row 8 \(id 8\)"):
        store.nodes([7, 8])
    with pytest.raises(StoreDamagedError, match="damaged: 49 of 50 sets: row 0, row 1"):
        store.verify()


def test_the_id_that_stands_for_none_is_refused(path):
    with LocalFeatureStore.create(path, channels=D, nodes=N) as writer:
        with pytest.raises(ValueError, match=r"^ids: expected none to be -1, .* got it at 1$"):
            writer.append([4, -1], torch.ones(2, N, D))
        writer.append([4, -2], torch.ones(2, N, D))
    assert LocalFeatureStore.open(path).ids.tolist() == [4, -2]


def test_one_default_for_the_size_of_shards(path):
    LocalFeatureStore.create(path, channels=D, nodes=N).close()
    made = LocalFeatureStore.open(path).manifest.shard_rows
    assert made == StoreManifest(channels=D, nodes=N, codec="float32").shard_rows == 4_194_304
