"""FAISS indexes of every kind as first stages, and the ones that are refused."""

import hashlib

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emd_retrieval.retrieval import FaissIndexShortlist, LocalFeatureStore

SIZE, CHANNELS = 600, 16


@pytest.fixture
def vectors(generator):
    return F.normalize(torch.randn(SIZE, CHANNELS, generator=generator), dim=1)


@pytest.fixture
def queries(vectors, generator):
    return vectors[:7] + 0.1 * torch.randn(7, CHANNELS, generator=generator)


def nearest(vectors, queries, k):
    return (F.normalize(queries, dim=1) @ vectors.T).topk(k, dim=1)


def built(factory, vectors, metric=faiss.METRIC_INNER_PRODUCT, ids=None):
    index = faiss.index_factory(CHANNELS, factory, metric)
    index.train(vectors.numpy())
    if ids is None:
        index.add(vectors.numpy())
    else:
        index.add_with_ids(vectors.numpy(), ids)
    return index


def store_of(folder, ids):
    kind = "string" if isinstance(ids[0], str) else "int64"
    with LocalFeatureStore.create(folder, channels=4, nodes=1, ids=kind) as writer:
        writer.append(ids, torch.ones(len(ids), 1, 4))
    return LocalFeatureStore.open(folder)


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        ("Flat", {}),
        ("IDMap,Flat", {}),
        ("IDMap2,Flat", {}),
        ("IVF8,Flat", {"nprobe": 8}),
        ("IDMap2,IVF8,Flat", {"nprobe": 8}),
        ("HNSW16", {"efSearch": 400}),
        ("IDMap,HNSW16", {"efSearch": 400}),
    ],
)
def test_exact_enough_indexes_find_the_nearest(tmp_path, vectors, queries, metric, factory,
                                               parameters):  # fmt: skip
    ids = np.arange(SIZE) * 2 + 11 if factory.startswith("IDMap") else None
    file = tmp_path / "some.index"
    faiss.write_index(built(factory, vectors, metric, ids), str(file))
    shortlist = FaissIndexShortlist.read(file, parameters=parameters)
    found = shortlist.search(queries, 5)
    scores, rows = nearest(vectors, queries, 5)
    expected = rows.numpy() if ids is None else ids[rows.numpy()]
    np.testing.assert_array_equal(found.ids, expected)
    # L2 as well: a squared distance of unit vectors becomes their cosine.
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    assert shortlist.describe()["vectors"] == SIZE


@pytest.mark.parametrize("factory", ["PQ8x4", "IVF4,PQ8x4", "IDMap,PQ8x4", "OPQ8,IVF4,PQ8x4"])
def test_quantised_indexes_mostly_find_them(vectors, queries, factory):
    index = built(factory, vectors, faiss.METRIC_L2, None if "IDMap" not in factory else
                  np.arange(SIZE))  # fmt: skip
    found = FaissIndexShortlist(index).search(queries, 50)
    first = nearest(vectors, queries, 1)[1]
    assert (found.ids == first.numpy()).any(axis=1).mean() > 0.7
    assert (np.diff(found.scores, axis=1) <= 1e-6).all()


def test_a_parameter_is_passed_on(vectors, queries):
    one = FaissIndexShortlist(built("IVF32,Flat", vectors), parameters={"nprobe": 1})
    assert (one.search(queries, SIZE).ids == -1).any()
    every = FaissIndexShortlist(built("IVF32,Flat", vectors), parameters={"nprobe": 32})
    assert not (every.search(queries, SIZE).ids == -1).any()


def test_what_is_not_found_is_absent(vectors, queries):
    found = FaissIndexShortlist.from_matrix(vectors[:3]).search(queries, 5)
    assert (found.ids[:, 3:] == -1).all()
    assert np.isneginf(found.scores[:, 3:]).all()
    named = FaissIndexShortlist.from_matrix(vectors[:3], ["a", "b", "c"]).search(queries, 5)
    assert set(named.ids[0]) == {"a", "b", "c", None}


def test_queries_are_normalised_unless_told_not_to(vectors):
    index = built("Flat", 3 * vectors)
    plain = FaissIndexShortlist(index, normalize=False).search(5 * vectors[:1], 1)
    assert plain.scores[0, 0] == pytest.approx(15, rel=1e-5)
    assert FaissIndexShortlist(index).search(5 * vectors[:1], 1).scores[0, 0] == pytest.approx(3)


def test_ids_are_held_against_the_store(tmp_path, vectors):
    store = store_of(tmp_path / "n.store", np.arange(500))
    with pytest.raises(
        ValueError,
        match=r"ids: 100 of its 600 ids of the index \(600 vectors\) are not in the store n\.store "
        r"\(500 sets\): 500, 501",
    ):
        FaissIndexShortlist(built("Flat", vectors)).check(store)
    FaissIndexShortlist(built("IDMap,Flat", vectors, ids=np.arange(SIZE) % 500)).check(store)
    with pytest.raises(ValueError, match=r"ids: 1 of its 600 ids"):
        FaissIndexShortlist(
            built("IDMap2,Flat", vectors, ids=np.arange(SIZE) % 500 + (np.arange(SIZE) == 499))
        ).check(store)


def test_stores_with_strings_want_names(tmp_path, vectors, queries):
    names = [f"bird {i}" for i in range(SIZE)]
    store = store_of(tmp_path / "s.store", names)
    with pytest.raises(ValueError, match=r"has numbers, the store s\.store .* strings as ids"):
        FaissIndexShortlist(built("Flat", vectors)).check(store)
    shortlist = FaissIndexShortlist(built("Flat", vectors), ids=store.ids)
    shortlist.check(store)
    assert shortlist.search(queries, 1).ids[0, 0] == f"bird {nearest(vectors, queries, 1)[1][0, 0]}"
    with pytest.raises(ValueError, match=r"has strings as ids, the store n\.store whole numbers"):
        shortlist.check(store_of(tmp_path / "n.store", np.arange(SIZE)))
    with pytest.raises(ValueError, match=r"one for each of the 600 vectors of the index, got 599"):
        FaissIndexShortlist(built("Flat", vectors), ids=names[1:])


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IDMap2,HNSW16", "PCA16,IDMap,Flat"])
def test_names_go_with_vectors_in_the_order_of_adding(tmp_path, vectors, factory):
    numbers = np.random.default_rng(0).permutation(SIZE) * 3 - SIZE
    numbers[numbers == -1] = 5000
    names = [f"bird {i}" for i in range(SIZE)]
    index = built(factory, vectors, ids=numbers)
    shortlist = FaissIndexShortlist(index, ids=names, parameters={"efSearch": 200} if "HNSW" in
                                    factory else {})  # fmt: skip
    shortlist.check(store_of(tmp_path / "s.store", names))
    found = shortlist.search(vectors[:50], 2)
    assert found.ids[:, 0].tolist() == names[:50]
    assert FaissIndexShortlist(index).search(vectors[:50], 1).ids[:, 0].tolist() == (
        numbers[:50].tolist()
    )
    twice = numbers.copy()
    twice[7] = twice[9]
    with pytest.raises(ValueError, match=rf"ids: expected each number .* got {twice[7]} more than"):
        FaissIndexShortlist(built(factory, vectors, ids=twice), ids=names)


def test_names_do_not_fit_lists_with_numbers_of_their_own(vectors):
    names = [f"bird {i}" for i in range(SIZE)]
    for numbers in (np.arange(SIZE) + 7, np.arange(SIZE)[::-1].copy(), np.arange(SIZE) - 3):
        index = built("IVF8,Flat", vectors, ids=numbers)
        with pytest.raises(ValueError, match=r"ids: the index was given numbers of its own"):
            FaissIndexShortlist(index, ids=names)
    counted = FaissIndexShortlist(built("IVF8,Flat", vectors), ids=names, parameters={"nprobe": 8})
    assert counted.search(vectors[:9], 1).ids[:, 0].tolist() == names[:9]


def test_the_stores_order_is_taken_only_where_it_can_be_meant(tmp_path, vectors):
    names = [f"bird {i}" for i in range(SIZE)]
    store = store_of(tmp_path / "s.store", names)
    for factory in ("Flat", "IDMap,Flat", "IVF8,Flat"):
        ids = np.arange(SIZE) if "IDMap" in factory else None
        shortlist = FaissIndexShortlist(built(factory, vectors, ids=ids), parameters=ivf(factory))
        shortlist.take_order_of(store)
        assert shortlist.search(vectors[:5], 1).ids[:, 0].tolist() == names[:5]
    for factory, ids in (("IDMap,Flat", np.arange(SIZE)[::-1].copy()),
                         ("IVF8,Flat", np.arange(SIZE) + 1)):  # fmt: skip
        with pytest.raises(ValueError, match=r"ids: g has? .*numbers of its|ids: g was given num"):
            FaissIndexShortlist(built(factory, vectors, ids=ids), name="g").take_order_of(store)
    short = FaissIndexShortlist(built("Flat", vectors[:500]), name="g")
    with pytest.raises(ValueError, match=r"g has 500 vectors, the store s\.store has 600 sets"):
        short.take_order_of(store)


@pytest.mark.parametrize("value", [0, -4, 1.5, float("nan"), float("inf")])
def test_parameters_that_count_nothing_are_refused(vectors, value):
    with pytest.raises(ValueError, match=r"parameters: expected 'nprobe' to be a whole number"):
        FaissIndexShortlist(built("IVF8,Flat", vectors), parameters={"nprobe": value})


def test_refusals_name_the_numbers(vectors, queries):
    shortlist = FaissIndexShortlist(built("Flat", vectors), name="gallery.faiss")
    with pytest.raises(ValueError, match=r"gallery\.faiss has 16 dimensions, .* vectors have 8"):
        shortlist.search(queries[:, :8], 3)
    with pytest.raises(ValueError, match=r"expected finite"):
        shortlist.search(queries * torch.nan, 3)
    with pytest.raises(TypeError, match=r"floating point, got int64"):
        shortlist.search(np.ones((2, 16), np.int64), 3)
    with pytest.raises(ValueError, match=r"k: expected a whole number"):
        shortlist.search(queries, 0)
    with pytest.raises(ValueError, match=r"metric number 2; expected inner product \(0\) or L2"):
        FaissIndexShortlist(faiss.IndexFlat(CHANNELS, faiss.METRIC_L1))
    with pytest.raises(ValueError, match=r"is empty"):
        FaissIndexShortlist(faiss.IndexFlatIP(CHANNELS))
    with pytest.raises(ValueError, match=r"is not trained"):
        FaissIndexShortlist(faiss.index_factory(CHANNELS, "IVF8,Flat"))
    with pytest.raises(ValueError, match=r"\(IndexFlat\w*\) takes no search parameter 'nprobe'"):
        FaissIndexShortlist(built("Flat", vectors), parameters={"nprobe": 4})
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(ValueError, match=r"cuda needs faiss-gpu"):
            FaissIndexShortlist(built("Flat", vectors), device="cuda")


def test_truncated_altered_and_foreign_files(tmp_path, vectors):
    file = tmp_path / "some.index"
    faiss.write_index(built("IVF8,Flat", vectors), str(file))
    data = file.read_bytes()
    for length in (0, 3, 40, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"some\.index \({length} bytes\) is truncated"):
            FaissIndexShortlist.read(file)
    file.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(ValueError, match=r"no FAISS index"):
        FaissIndexShortlist.read(file)
    with pytest.raises(FileNotFoundError, match="no file"):
        FaissIndexShortlist.read(tmp_path / "none.index")
    file.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "some.index.sha256").write_text(f"{digest}  some.index\n")
    assert FaissIndexShortlist.read(file).size == SIZE
    altered = bytearray(data)
    altered[-9] ^= 4
    file.write_bytes(altered)
    with pytest.raises(ValueError, match=r"was altered: it does not fit some\.index\.sha256"):
        FaissIndexShortlist.read(file)


@pytest.mark.parametrize(
    "factory", ["Flat", "IDMap,Flat", "HNSW8", "IVF8,Flat", "SQ8", "PQ8x4", "IVF4,PQ8x4"]
)
def test_an_l2_index_of_other_norms_wants_queries_as_they_are(vectors, queries, factory):
    long = vectors * torch.linspace(2, 5, SIZE)[:, None]
    ids = np.arange(SIZE) if factory.startswith("IDMap") else None
    index = built(factory, long, faiss.METRIC_L2, ids)
    message = r"g\.faiss compares by L2 and its vectors .* \(100 looked at: .*--no-normalize"
    with pytest.raises(ValueError, match=message):
        FaissIndexShortlist(index, name="g.faiss")
    plain = FaissIndexShortlist(index, normalize=False, parameters=ivf(factory))
    if factory in ("Flat", "IDMap,Flat", "IVF8,Flat"):
        expected = torch.cdist(3 * queries, long).argmin(dim=1)
        assert plain.search(3 * queries, 1).ids[:, 0].tolist() == expected.tolist()
    assert FaissIndexShortlist(built(factory, vectors, faiss.METRIC_L2, ids)).size == SIZE
    # Inner products rank the same for any scale of the query.
    assert FaissIndexShortlist(built(factory, long, ids=ids)).size == SIZE


def ivf(factory):
    return {"nprobe": 8} if factory == "IVF8,Flat" else {}


@pytest.mark.parametrize("factory", ["PCA8,Flat", "LSH", "OPQ8,IVF4,PQ8x4"])
def test_what_gives_no_vectors_back_is_taken_as_it_is(vectors, factory):
    index = built(factory, 3 * vectors, faiss.METRIC_L2)
    assert FaissIndexShortlist(index).size == SIZE


def test_negative_ids_are_ids_and_minus_one_is_none(tmp_path, vectors):
    numbers = np.arange(SIZE) - SIZE - 1
    store = store_of(tmp_path / "n.store", numbers)
    shortlist = FaissIndexShortlist(built("IDMap,Flat", vectors, ids=numbers))
    shortlist.check(store)
    found = shortlist.search(vectors[:2], SIZE + 1)
    assert found.ids[:, 0].tolist() == [-601, -600]
    assert found.ids[0, -1] == -1
    assert (np.isneginf(found.scores) == (found.ids == -1)).all()
    with pytest.raises(ValueError, match=r"^ids: expected none to be -1, which stands for no"):
        store_of(tmp_path / "x.store", [3, -1, 4])
    with pytest.raises(ValueError, match=r"1 of its 600 ids .* are not in the store n\.store"):
        FaissIndexShortlist(built("IDMap,Flat", vectors, ids=numbers + 1)).check(store)


@pytest.mark.skipif(
    not hasattr(faiss, "set_deserialization_vector_byte_limit"), reason="an earlier FAISS"
)
@pytest.mark.parametrize(("factory", "size"), [("Flat", 4), ("SQ8", 1)])
def test_an_index_that_claims_more_than_its_file_holds_takes_no_memory(
    factory, size, tmp_path, vectors
):
    """The system would end a process that fills what a flipped bit of a length asks for."""
    index = built(factory, vectors)
    file = tmp_path / "large.faiss"
    faiss.write_index(index, str(file))
    data = bytearray(file.read_bytes())
    data[-SIZE * CHANNELS * size - 4] |= 0x20  # of the codes' length before them: 2^37 more
    file.write_bytes(data)
    before = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(ValueError, match=r"large\.faiss .* is truncated, damaged .*byte_limit"):
        FaissIndexShortlist.read(file)
    assert faiss.get_deserialization_vector_byte_limit() == before
