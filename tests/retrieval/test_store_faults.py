"""What a store makes of damage, hostile manifests, full disks, kills and rival writers."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from emd_retrieval.retrieval import (
    EMDReranker,
    LocalFeatureStore,
    StoreDamagedError,
    StoreLockedError,
)
from emd_retrieval.retrieval.store import create_part, join_parts, parts_started

N, D, COUNT = 4, 8, 12
PART = {"channels": D, "nodes": N, "codec": "float32", "ids": "int64"}
ROOT = Path(__file__).parents[2]
FILES = [
    "ids.bin", "id_ends.bin", "nodes.bin", "node_ends.bin", "rows.crc", "global.bin", "global.crc",
    f"index-{COUNT}.bin",
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "birds.store"


@pytest.fixture
def sets(generator):
    return torch.randn(COUNT, N, D, generator=generator)


def names(count=COUNT):
    return [f"robin/{i:03d}.jpg" for i in range(count)]


@pytest.fixture
def store(path, sets):
    """Every kind of file is in it."""
    with LocalFeatureStore.create(
        path, channels=D, nodes=None, codec="int8", global_channels=D, ids="string"
    ) as writer:
        writer.append(names(), sets, sets.mean(dim=1))
    return path


def edited(path, change):
    """Change the manifest and give it a checksum that fits, as an attacker would."""
    file = path / "store.json"
    data = json.loads(file.read_text())
    del data["sha256"]
    change(data)
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(data))


def test_the_list_of_files_is_whole(store):
    assert sorted(FILES) == sorted(file.name for file in (store / "shard-000000").iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_named(store, name, generator):
    """By verify() always; by reading before it can make a wrong neighbour."""
    sound = LocalFeatureStore.open(store)
    expected = sound.nodes(), sound.global_vectors(), sound.rows_of(names())
    file = store / "shard-000000" / name
    whole = file.read_bytes()
    for _ in range(12):
        bit = int(torch.randint(8 * len(whole), (1,), generator=generator))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        damaged = LocalFeatureStore.open(store)
        with pytest.raises(StoreDamagedError, match=f"{name} was altered"):
            damaged.verify()
        with pytest.raises(StoreDamagedError, match=f"{name} was altered"):
            LocalFeatureStore.open(store, verify=True)
        try:
            found = damaged.nodes(), damaged.global_vectors(), damaged.rows_of(names())
        except StoreDamagedError:
            continue
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [*FILES, "store.json"])
def test_a_truncated_or_missing_file_is_refused_at_once(store, name, generator):
    file = store / name if name == "store.json" else store / "shard-000000" / name
    whole = file.read_bytes()
    for size in {0, len(whole) - 2, int(torch.randint(len(whole) - 1, (1,), generator=generator))}:
        file.write_bytes(whole[:size])
        with pytest.raises(StoreDamagedError, match=name):
            LocalFeatureStore.open(store)
        with pytest.raises(StoreDamagedError, match=name):
            LocalFeatureStore.append_to(store)
    file.unlink()
    with pytest.raises((StoreDamagedError, FileNotFoundError), match=f"{name}.*is missing"):
        LocalFeatureStore.open(store)
    file.write_bytes(whole)
    LocalFeatureStore.open(store, verify=True)


@pytest.mark.parametrize("name", ["nodes.bin", "global.bin"])
@pytest.mark.parametrize("nodes", [N, None])
def test_a_file_cut_off_under_an_open_store_is_an_error(path, sets, name, nodes):
    """Not the signal that a mapped file would send."""
    with LocalFeatureStore.create(path, channels=D, nodes=nodes, global_channels=D) as writer:
        writer.append(list(range(COUNT)), sets, sets.mean(dim=1))
    store = LocalFeatureStore.open(path)
    read = store.nodes if name == "nodes.bin" else store.global_vectors
    whole = read()
    file = path / "shard-000000" / name
    os.truncate(file, file.stat().st_size * 3 // 4)
    with pytest.raises(StoreDamagedError, match=rf"{name} is truncated: .* row 9 .*\(id 9\)"):
        read()
    assert torch.equal(read([8, 0]), whole[[8, 0]])
    if name == "nodes.bin" and nodes:
        reranker = EMDReranker(store)
        assert reranker.rerank(whole[3:4], [[8, 3]], k=1).ids.tolist() == [[3]]
        with pytest.raises(StoreDamagedError, match="ends before row 10"):
            reranker.rerank(whole[3:4], [[3, 10]], k=1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_nodes_are_not_mapped_and_files_are_closed(store):
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    opened = LocalFeatureStore.open(store)
    opened.nodes()
    opened.global_vectors()
    maps = Path("/proc/self/maps").read_text()
    assert str(store / "shard-000000" / "rows.crc") in maps
    assert str(store / "shard-000000" / "nodes.bin") not in maps
    assert str(store / "shard-000000" / "global.bin") not in maps
    places = opened.places([1])
    assert places is None, "sets vary in size"
    del opened
    assert len(list(files.iterdir())) == before


def test_places_keep_their_files_open(path, sets):
    with LocalFeatureStore.create(path, channels=D, nodes=N, codec="float32") as writer:
        writer.append(list(range(COUNT)), sets)
    store = LocalFeatureStore.open(path)
    assert store.places([3, 1]) is None, "not held against their checksums yet"
    store.nodes([3, 1])
    assert store.places([3, 2]) is None
    places = store.places([3, 1])
    del store
    for row, file, offset in zip([3, 1], places.files, places.offsets, strict=True):
        data = os.pread(int(file), N * D * 4, int(offset))
        assert data == sets[row].numpy().tobytes()


def test_every_flipped_bit_of_the_manifest_is_found(store, generator):
    file = store / "store.json"
    whole = file.read_bytes()
    for bit in torch.randint(8 * len(whole), (150,), generator=generator).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"store: .*(store\.json|format version)"):
            LocalFeatureStore.open(store)


@pytest.mark.parametrize(
    "name", ["/etc", "../other", "shard-000000/..", "part-00000-of-00002/../..", "", "shard-0", 7]
)
def test_a_manifest_cannot_name_what_lies_outside(store, name):
    edited(store, lambda data: data["shards"][0].update(path=name))
    with pytest.raises(StoreDamagedError, match="is no name of a shard"):
        LocalFeatureStore.open(store)


@pytest.mark.parametrize("name", ["../store.json", "/etc/passwd", "nodes", "secret.txt"])
def test_a_manifest_cannot_name_other_files(store, name):
    edited(store, lambda data: data["shards"][0]["files"].update({name: {"bytes": 1, "crc32": 0}}))
    with pytest.raises(StoreDamagedError, match=r"is no name of a shard's file"):
        LocalFeatureStore.open(store)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_folder_are_not_followed(store, tmp_path, what):
    shard = store / "shard-000000"
    inner = shard / "nodes.bin" if what == "file" else shard
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    for use in (LocalFeatureStore.open, LocalFeatureStore.append_to):
        with pytest.raises(StoreDamagedError, match="leads out of the store's folder"):
            use(store)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["shards"][0].update(rows=2**62),
        lambda data: data["shards"][0].update(rows=-1),
        lambda data: data["shards"][0].update(rows=True),
        lambda data: data["shards"][0].update(nodes=1),
        lambda data: data["shards"][0].update(indexed=COUNT + 1),
        lambda data: data["shards"][0].update(indexed=3),
        lambda data: data["shards"][0].pop("rows"),
        lambda data: data["shards"].append(data["shards"][0]),
        lambda data: data.update(shards=7),
        lambda data: data.update(surprise=1),
        lambda data: data.update(channels=10**9),
        lambda data: data.update(channels=0),
        lambda data: data.update(codec="pickle"),
        lambda data: data.update(ids="int64"),
        lambda data: data.update(nodes=N + 1),
        lambda data: data.update(deleted=1),
        lambda data: data.update(extractor=[1]),
        lambda data: data.update(complete=2),
        lambda data: data.pop("codec"),
    ],
)
def test_a_manifest_that_fits_nothing_is_refused(store, change):
    edited(store, change)
    with pytest.raises(StoreDamagedError, match="store: "):
        LocalFeatureStore.open(store)


def test_another_version_or_format(store):
    edited(store, lambda data: data.update(version=2))
    with pytest.raises(ValueError, match="has format version 2; this release reads version 1"):
        LocalFeatureStore.open(store)
    for text in ("[]", "{}", "[" * 100_000, '{"a": NaN}', "\0"):
        (store / "store.json").write_text(text)
        with pytest.raises(StoreDamagedError, match="is no manifest"):
            LocalFeatureStore.open(store)


def test_altered_deletions_are_refused(store):
    LocalFeatureStore.open(store).delete(names()[3:5])
    file = store / "deleted-2.bin"
    file.write_bytes(np.array([3, 5], "<i8").tobytes())
    with pytest.raises(StoreDamagedError, match=r"deleted-2.bin was altered"):
        LocalFeatureStore.open(store)
    file.write_bytes(np.array([3], "<i8").tobytes())
    with pytest.raises(StoreDamagedError, match=r"deleted-2.bin was altered"):
        LocalFeatureStore.open(store)


def test_a_row_under_another_id_is_damage(path, sets):
    """Checksums bind a set to its id, so that swapped ids make no wrong neighbours."""
    with LocalFeatureStore.create(path, channels=D, nodes=N) as writer:
        writer.append(list(range(COUNT)), sets)
    file = path / "shard-000000" / "ids.bin"
    ids = np.fromfile(file, "<i8")
    ids[[2, 3]] = ids[[3, 2]]
    ids.tofile(file)
    store = LocalFeatureStore.open(path)
    with pytest.raises(StoreDamagedError, match=r"the id index and ids.bin disagree on id 2"):
        store.rows_of([2])
    with pytest.raises(StoreDamagedError, match=r"nodes.bin was altered: row 2 \(id 3\)"):
        store.nodes([2])


def test_what_a_killed_writer_left_is_cut_off(store, sets):
    """Bytes behind the commit, an index, a shard and a manifest that nothing names."""
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    for name in FILES[:-1]:
        with (store / "shard-000000" / name).open("ab") as file:
            file.write(b"half a row")
    (store / "shard-000000" / "index-99.bin").write_bytes(b"half an index")
    (store / "shard-000001").mkdir()
    (store / "shard-000001" / "ids.bin").write_bytes(b"never committed")
    (store / "deleted-9.bin").write_bytes(b"never committed")
    (store / "store.json.partial").write_text("{")
    LocalFeatureStore.open(store, verify=True)
    with LocalFeatureStore.append_to(store) as writer:
        writer.append(["new"], sets[:1], sets[:1, 0])
    after = {file for file in store.rglob("*") if file.is_file()}
    renamed = {Path(str(file).replace("index-12", "index-13")) for file in before}
    assert after == renamed
    opened = LocalFeatureStore.open(store, verify=True)
    assert opened.ids == [*names(), "new"]


def test_what_a_writer_killed_behind_its_commit_left_goes_too(path, sets):
    """The old index of a shard that is full since, and the manifests of joined parts."""
    for part in (0, 1):
        with create_part(path, part, 2, **PART, shard_rows=3) as writer:
            writer.append([part], sets[:1])
    part_manifest = path / "part-00000-of-00002" / "store.json"
    text = part_manifest.read_text()
    join_parts(path, 2)
    with LocalFeatureStore.append_to(path) as writer:
        writer.append([2, 3, 4, 5], sets[:4])
    before = {file for file in path.rglob("*") if file.is_file()}
    (path / "shard-000000" / "index-2.bin").write_bytes(b"old")
    part_manifest.write_text(text)
    assert create_part(path, 0, 2, **PART, shard_rows=3) is None
    LocalFeatureStore.append_to(path).close()
    assert {file for file in path.rglob("*") if file.is_file()} == before
    LocalFeatureStore.open(path, verify=True)


def test_a_full_disk_leaves_what_was_committed(store, generator):
    """The limit on file sizes stands for the disk's end: the same call fails, half-way."""
    more = torch.randn(4000, N, D, generator=generator)
    before = {file: file.read_bytes() for file in store.rglob("*.*") if file.is_file()}
    writer = LocalFeatureStore.append_to(store)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.append([f"new {i}" for i in range(4000)], more, more[:, 0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file: file.read_bytes() for file in store.rglob("*.*") if file.is_file()} == before
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.append(["x"], more[:1], more[:1, 0])
    with LocalFeatureStore.append_to(store) as writer:
        writer.append(["x"], more[:1], more[:1, 0])
    assert len(LocalFeatureStore.open(store, verify=True)) == COUNT + 1


def test_a_manifest_that_cannot_be_written_changes_nothing(store, sets, monkeypatch):
    from emd_retrieval.retrieval.store import manifest

    def full(handle):
        raise OSError(28, "No space left on device")

    writer = LocalFeatureStore.append_to(store)
    writer.append(["x"], sets[:1], sets[:1, 0])
    monkeypatch.setattr(manifest.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.commit()
    monkeypatch.undo()
    assert LocalFeatureStore.open(store, verify=True).ids == names()
    assert not (store / "store.json.partial").exists()
    LocalFeatureStore.append_to(store).close()


def in_process(work, *arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def hold(path, ready):
    with LocalFeatureStore.append_to(path) as writer:
        writer.append(["of a rival"], torch.ones(1, N, D), torch.ones(1, D))
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_behind_the_new_manifest_loses_nothing(path, sets, monkeypatch, error):
    """Ctrl-C while the folder is synced: what the manifest names by then is not cut off."""

    def interrupted(folder):
        raise error("here")

    with LocalFeatureStore.create(path, **PART) as writer:
        writer.append(range(4), sets[:4])
        writer.commit()
        writer.append(range(4, 8), sets[4:8])
        with monkeypatch.context() as patch:
            patch.setattr("emd_retrieval.retrieval.store.manifest.sync_folder", interrupted)
            with pytest.raises(error, match="here"):
                writer.commit()
    store = LocalFeatureStore.open(path, verify=True)
    assert torch.equal(store.nodes(), sets[:8])
    with LocalFeatureStore.append_to(path) as writer:
        writer.append(range(8, 12), sets[8:])
    assert torch.equal(LocalFeatureStore.open(path, verify=True).nodes(), sets)


def test_the_second_of_two_processes_is_refused_until_the_first_is_dead(store, sets):
    ready = multiprocessing.get_context("fork").Event()
    rival = in_process(hold, store, ready)
    assert ready.wait(30)
    with pytest.raises(StoreLockedError, match=f"is being written by process {rival.pid};"):
        LocalFeatureStore.append_to(store)
    os.kill(rival.pid, signal.SIGKILL)
    rival.join()
    with LocalFeatureStore.append_to(store) as writer:
        writer.append(["mine"], sets[:1], sets[:1, 0])
    assert LocalFeatureStore.open(store, verify=True).ids == [*names(), "mine"]


def test_a_forked_child_does_not_keep_a_dead_writers_lock(store):
    """Decoding processes outlive a killed writer by seconds."""

    def parent(queue):
        writer = LocalFeatureStore.append_to(store)
        child = in_process(time.sleep, 30)
        queue.put(child.pid)
        time.sleep(60)
        writer.close()

    queue = multiprocessing.get_context("fork").Queue()
    process = in_process(parent, queue)
    orphan = queue.get(timeout=30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        os.kill(orphan, 0)
        LocalFeatureStore.append_to(store).close()
    finally:
        os.kill(orphan, signal.SIGKILL)


def append_for_ever(path, start):
    with LocalFeatureStore.append_to(path) as writer:
        number = start
        while True:
            writer.append([number], torch.full((1, N, D), float(number)))
            writer.commit()
            number += 1


def test_readers_in_another_process_see_whole_rows_during_append(path):
    LocalFeatureStore.create(path, channels=D, nodes=N, shard_rows=20).close()
    writer = in_process(append_for_ever, path, 0)
    try:
        sizes = []
        deadline = time.monotonic() + 20
        while (not sizes or sizes[-1] < 50) and time.monotonic() < deadline:
            store = LocalFeatureStore.open(path, verify=True)
            sizes.append(len(store))
            assert store.ids.tolist() == list(range(len(store)))
            assert store.nodes()[:, 0, 0].tolist() == list(range(len(store)))
        assert sizes == sorted(sizes)
        assert len(set(sizes)) > 3
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()


def test_parts_are_joined_by_the_last_one(path, sets):
    second = create_part(path, 1, 2, **PART)
    assert parts_started(path) == 2
    with second:
        second.append([6, 7], sets[6:8])
    assert not join_parts(path, 2)
    with create_part(path, 0, 2, **PART) as first:
        first.append([0, 1, 2], sets[:3])
        first.commit()
        assert not join_parts(path, 2), "a part that is being written is waited for"
    with pytest.raises(FileNotFoundError):
        LocalFeatureStore.open(path)
    seen = []
    assert join_parts(path, 2, before=seen.extend)
    assert [folder.name for folder in seen] == ["part-00000-of-00002", "part-00001-of-00002"]
    assert join_parts(path, 2), "again is harmless"
    assert create_part(path, 0, 2, **PART) is None
    assert parts_started(path) is None
    assert len(list(path.rglob("store.json"))) == 1
    store = LocalFeatureStore.open(path, verify=True)
    assert store.ids.tolist() == [0, 1, 2, 6, 7]
    assert torch.equal(store.nodes(), sets[[0, 1, 2, 6, 7]])
    with LocalFeatureStore.append_to(path) as writer:
        writer.append([8], sets[8:9])
    store.refresh()
    assert store.rows_of([8, 7]).tolist() == [5, 4]


def test_parts_that_do_not_fit(path, sets):
    with create_part(path, 0, 2, **PART) as writer:
        writer.append([0], sets[:1])
    with pytest.raises(ValueError, match="was started by 2 processes, got 3"):
        create_part(path, 0, 3, **PART)
    with pytest.raises(ValueError, match="part: expected 0 to 1 of 2, got 2"):
        create_part(path, 2, 2, **PART)
    with create_part(path, 1, 2, **PART) as writer:
        writer.append([0], sets[:1])
    with pytest.raises(ValueError, match="share 1 ids, the first is 0"):
        join_parts(path, 2)


def test_parts_of_different_settings_are_not_joined(path):
    create_part(path, 0, 2, **PART).close()
    create_part(path, 1, 2, **{**PART, "codec": "int8"}).close()
    with pytest.raises(ValueError, match=r"codec: .* written with 'int8', got 'float32'"):
        join_parts(path, 2)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_a_lock_that_is_not_taken_leaves_no_handle_open(store, monkeypatch):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    def full(handle, data):
        raise OSError(28, "No space left on device")

    before = count()
    with monkeypatch.context() as patch:
        patch.setattr("emd_retrieval.retrieval.store.lock.os.write", full)
        for _ in range(5):
            with pytest.raises(OSError, match="No space left"):
                LocalFeatureStore.append_to(store)
    assert count() == before
    with LocalFeatureStore.append_to(store):
        for _ in range(5):
            with pytest.raises(StoreLockedError):
                LocalFeatureStore.append_to(store)
    assert count() == before


def test_a_writer_that_is_dropped_lets_the_next_one_in(store, sets):
    writer = LocalFeatureStore.append_to(store)
    writer.append(["lost"], sets[:1], sets[:1, 0])
    with pytest.raises(StoreLockedError):
        LocalFeatureStore.append_to(store)
    del writer
    LocalFeatureStore.append_to(store).close()
    assert LocalFeatureStore.open(store, verify=True).ids == names()


def test_a_forked_child_leaves_the_writers_lock_alone(store):
    """Neither the process id in it, which messages tell, nor what keeps others out."""
    writer = LocalFeatureStore.append_to(store)

    def drop():
        nonlocal writer
        del writer

    child = in_process(drop)
    child.join()
    assert child.exitcode == 0
    queue = multiprocessing.get_context("fork").Queue()
    rival = in_process(tell_refusal, store, queue)
    assert f"is being written by process {os.getpid()};" in queue.get(timeout=30)
    rival.join()
    writer.close()


def tell_refusal(path, queue):
    try:
        LocalFeatureStore.append_to(path)
    except StoreLockedError as error:
        queue.put(str(error))
    else:
        queue.put("not refused")


@pytest.mark.parametrize("what", ["index-13.bin", "deleted-1.bin", "store.json"])
def test_each_file_that_cannot_be_written_is_named_and_leaves_nothing(
    store, sets, monkeypatch, what
):
    before = {file: file.read_bytes() for file in store.rglob("*.*") if file.is_file()}
    real = os.fsync

    def full(handle):
        if Path(f"/proc/self/fd/{handle}").resolve().name.startswith(what):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)

    def append():
        with LocalFeatureStore.append_to(store) as writer:
            writer.append(["x"], sets[:1], sets[:1, 0])

    def delete():
        LocalFeatureStore.open(store).delete(names()[:1])

    with pytest.raises(OSError, match=f"No space left on device: .*{what}"):
        (delete if what.startswith("deleted") else append)()
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in store.rglob("*.*") if file.is_file()} == before
