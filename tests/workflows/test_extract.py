"""Extraction into a store: what is in it, resuming, shards, unreadable images."""

import csv
import hashlib
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_data
import torch

from emd_retrieval.datasets import ImageDataset, UnreadableImageError, load_images
from emd_retrieval.features import FCNExtractor, extract_features, load_backbone
from emd_retrieval.retrieval import LocalFeatureStore, StoreLockedError
from emd_retrieval.workflows import ExtractImages, extract, extract_images
from emd_retrieval.workflows.extract import read_skipped
from emd_retrieval.workflows.images import read_image_list


@pytest.fixture
def settings(image_folder, weights, tmp_path):
    return ExtractImages(
        images=image_folder,
        store=tmp_path / "birds.store",
        backbone=small_data.BACKBONE,
        weights=weights,
        resize=48,
        crop=48,
        pyramid=(2, 1),
        batch_size=4,
    )


@pytest.fixture
def damaged(settings, image_folder, tmp_path):
    """Settings for a copy of the images, two of which are damaged."""
    folder = tmp_path / "birds"
    shutil.copytree(image_folder, folder)
    (folder / "robin" / "03.png").write_bytes(b"no image")
    (folder / "tit" / "03.png").write_bytes(b"")
    return replace(settings, images=folder)


def fingerprint(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "writer.lock"
    }


def killed_after(settings, commits):
    """Run in another process, which kills itself behind a commit."""

    def work():
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        extract._COMMIT_SECONDS = 0.0
        done = []
        commit = extract.StoreWriter.commit

        def commit_and_die(writer):
            commit(writer)
            done.append(1)
            if len(done) == commits:
                os.kill(os.getpid(), signal.SIGKILL)

        extract.StoreWriter.commit = commit_and_die
        extract_images(settings)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_the_store_holds_what_the_extractor_gives(settings, image_folder, weights):
    done = extract_images(replace(settings, codec="float32"))
    assert (done.images, done.stored, done.there, done.skipped) == (12, 12, 0, {})
    assert done.joined
    store = LocalFeatureStore.open(settings.store, verify=True)
    backbone = load_backbone(small_data.BACKBONE, weights=weights)
    extractor = FCNExtractor(backbone, pyramid=(2, 1))
    expected = extract_features(
        ImageDataset(load_images(image_folder), extractor.evaluation_transform(resize=48, crop=48)),
        extractor,
        batch_size=4,
    )
    assert store.ids[0] == "robin/00.png"
    order = np.argsort(store.ids)
    assert torch.equal(store.nodes(order), expected.nodes)
    assert torch.equal(store.global_vectors(order), expected.global_vectors)
    manifest = store.manifest
    assert (manifest.nodes, manifest.codec) == (5, "float32")
    assert manifest.extractor["pyramid"] == [2, 1]
    assert manifest.extractor["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "nodes"),
    [
        ({"extractor": "grid", "grid": (2, 1), "patch_size": 32}, 5),
        ({"extractor": "sampling", "patches": 3, "patch_size": 32}, 3),
        ({"include_map": True}, None),
    ],
)
def test_every_extractor_fills_a_store(settings, changes, nodes):
    extract_images(replace(settings, **changes))
    store = LocalFeatureStore.open(settings.store, verify=True)
    assert store.manifest.nodes == (nodes or store.nodes([0]).shape[1])
    assert torch.isfinite(store.nodes()).all()
    assert len(store.nodes().flatten(1).unique(dim=0)) == 12, "images differ"


def test_without_global_vectors(settings):
    extract_images(replace(settings, global_vectors=False))
    assert LocalFeatureStore.open(settings.store).manifest.global_channels is None


@pytest.mark.parametrize("commits", [1, 2])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(settings, tmp_path, commits):
    whole = replace(settings, store=tmp_path / "whole.store")
    extract_images(whole)
    killed_after(settings, commits)
    left = LocalFeatureStore.open(settings.store, verify=True)
    assert len(left) == 4 * commits
    done = extract_images(settings)
    assert (done.stored, done.there) == (12 - 4 * commits, 4 * commits)
    assert fingerprint(settings.store) == fingerprint(whole.store)
    again = extract_images(settings)
    assert (again.stored, again.there) == (0, 12)
    assert fingerprint(settings.store) == fingerprint(whole.store)


def test_new_images_are_added(damaged):
    (damaged.images / "robin" / "03.png").unlink()
    (damaged.images / "tit" / "03.png").unlink()
    extract_images(damaged)
    small_data.write_images(damaged.images, classes=("wagtail",))
    done = extract_images(damaged)
    assert (done.stored, done.there) == (4, 10)
    assert len(LocalFeatureStore.open(damaged.store, verify=True)) == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "int8"}, "codec: the store .* was written with 'float16', got 'int8'"),
        ({"pyramid": (3, 1)}, "nodes: the store .* was written with 5, got 10"),
        ({"crop": 40}, "extractor crop: the store .* was written with 48, got 40"),
        ({"global_vectors": False}, "global_channels: the store"),
    ],
)
def test_other_settings_are_refused(settings, changes, message):
    extract_images(settings)
    before = fingerprint(settings.store)
    with pytest.raises(ValueError, match=message):
        extract_images(replace(settings, **changes))
    assert fingerprint(settings.store) == before


def test_other_weights_are_refused(settings, tmp_path):
    extract_images(settings)
    other = small_data.write_weights(tmp_path / "net.safetensors", seed=1)
    with pytest.raises(ValueError, match="extractor weights_sha256: the store"):
        extract_images(replace(settings, weights=other))


def test_an_unreadable_image_stops_the_run_and_loses_nothing(damaged):
    (damaged.images / "robin" / "03.png").unlink()
    message = "tit/03.png: the file is empty.*--skip-errors.*; 4 images are stored already"
    with pytest.raises(UnreadableImageError, match=message):
        extract_images(damaged)
    store = LocalFeatureStore.open(damaged.store, verify=True)
    assert len(store) == 4
    assert not store.manifest.complete


def test_unreadable_images_are_listed_on_request(damaged, tmp_path):
    lenient = replace(damaged, skip_errors=True)
    done = extract_images(lenient)
    assert done.stored == 10
    assert list(done.skipped) == ["robin/03.png", "tit/03.png"]
    with (damaged.store / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["robin/03.png", "tit/03.png"]
    assert rows[0]["reason"] == "not an image, or one of an unknown format"
    shutil.copy(damaged.images / "robin" / "02.png", damaged.images / "robin" / "03.png")
    again = extract_images(lenient)
    assert (again.stored, again.there) == (1, 10), "a mended image is tried again"
    assert list(read_skipped(damaged.store)) == ["tit/03.png"]
    assert LocalFeatureStore.open(damaged.store, verify=True).ids[-1] == "robin/03.png"


@pytest.mark.parametrize("commits", [1, 2])
def test_a_killed_lenient_run_ends_in_the_same_bytes(damaged, tmp_path, commits):
    lenient = replace(damaged, skip_errors=True)
    whole = replace(lenient, store=tmp_path / "whole.store")
    extract_images(whole)
    killed_after(lenient, commits)
    (lenient.store / "skipped.csv.partial").write_text("half a li")
    extract_images(lenient)
    assert fingerprint(lenient.store) == fingerprint(whole.store)


def test_workers_change_nothing(damaged, tmp_path):
    lenient = replace(damaged, skip_errors=True)
    other = replace(lenient, store=tmp_path / "other.store", num_workers=2)
    extract_images(lenient)
    extract_images(other)
    assert fingerprint(lenient.store) == fingerprint(other.store)


def test_two_processes_one_killed_and_run_again(settings, tmp_path):
    alone = replace(settings, store=tmp_path / "alone.store", batch_size=3)
    extract_images(alone)
    first, second = (replace(settings, part=i, parts=2, batch_size=3) for i in (0, 1))
    killed_after(second, 1)
    done = extract_images(first)
    assert (done.images, done.stored, done.joined) == (6, 6, False)
    with pytest.raises(FileNotFoundError, match="no store"):
        LocalFeatureStore.open(settings.store)
    with pytest.raises(ValueError, match="was started by 2 processes; go on with 2"):
        extract_images(settings)
    with pytest.raises(ValueError, match="was started by 2 processes, got 3"):
        extract_images(replace(first, parts=3))
    done = extract_images(second)
    assert (done.stored, done.there, done.joined) == (3, 3, True)
    store = LocalFeatureStore.open(settings.store, verify=True)
    whole = LocalFeatureStore.open(alone.store)
    assert store.ids == whole.ids, "the order does not depend on the processes"
    assert torch.equal(store.nodes(), whole.nodes())
    assert len(list(settings.store.rglob("store.json"))) == 1
    again = extract_images(first)
    assert (again.stored, again.there, again.joined) == (0, 6, True)


def test_a_finished_shared_store_grows_by_one_process(damaged):
    shared = [replace(damaged, part=i, parts=2, skip_errors=True) for i in (0, 1)]
    for one in shared:
        extract_images(one)
    assert list(read_skipped(damaged.store)) == ["robin/03.png", "tit/03.png"]
    small_data.write_images(damaged.images, classes=("wagtail",))
    with pytest.raises(ValueError, match=r"lacks 4 of these images.* one process without shards"):
        extract_images(shared[1])
    done = extract_images(replace(damaged, skip_errors=True))
    assert (done.stored, done.there) == (4, 10)
    assert len(LocalFeatureStore.open(damaged.store, verify=True)) == 14


def test_more_processes_than_images(settings, image_folder, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{image_folder}/wren/01.png\n")
    for part in (1, 0):
        done = extract_images(replace(settings, images=listed, part=part, parts=2))
    assert done.joined
    assert len(LocalFeatureStore.open(settings.store)) == 1


def test_the_second_writer_is_refused(settings):
    extract_images(settings)
    with (
        LocalFeatureStore.append_to(settings.store),
        pytest.raises(StoreLockedError, match="is being written by"),
    ):
        extract_images(settings)


def test_lists_and_tables(image_folder, tmp_path):
    names = ["wren/01.png", "tit/00.png"]
    listed = image_folder.parent / "list.txt"
    listed.write_text("\n birds/wren/01.png\n\nbirds/tit/00.png \n")
    images = read_image_list(listed)
    assert images.ids == ["birds/wren/01.png", "birds/tit/00.png"]
    assert all(path.is_file() for path in images.paths)
    table = pd.DataFrame({"path": [str(image_folder / name) for name in names], "id": [40, 7]})
    table.to_parquet(tmp_path / "images.parquet")
    images = read_image_list(tmp_path / "images.parquet")
    assert images.ids.tolist() == [40, 7]
    assert images.ids.dtype == np.int64
    table.assign(id=["a", "b"]).to_csv(tmp_path / "images.csv")
    assert read_image_list(tmp_path / "images.csv").ids == ["a", "b"]
    assert read_image_list(image_folder).ids == sorted(
        f"{name}/{i:02d}.png" for name in small_data.CLASSES for i in range(4)
    )


def test_numbers_as_ids(settings, image_folder, tmp_path):
    files = sorted(image_folder.rglob("*.png"))[:3]
    table = pd.DataFrame({"path": map(str, files), "id": [30, 10, 20]})
    table.to_parquet(tmp_path / "images.parquet")
    extract_images(replace(settings, images=tmp_path / "images.parquet"))
    store = LocalFeatureStore.open(settings.store)
    assert store.ids.tolist() == [30, 10, 20]
    assert store.rows_of([20]).tolist() == [2]


def test_hidden_files_and_loops_are_passed_over(tmp_path):
    folder = small_data.write_images(tmp_path / "birds", per_class=1)
    (folder / ".cache").mkdir()
    shutil.copy(folder / "wren" / "00.png", folder / ".cache" / "00.png")
    (folder / "loop").symlink_to(folder)
    (folder / "notes.txt").write_text("no image")
    shutil.copy(folder / "wren" / "00.png", folder / "flat ü.png")
    assert read_image_list(folder).ids == [
        "flat ü.png", "robin/00.png", "tit/00.png", "wren/00.png"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p.mkdir(), FileNotFoundError, r"has no image \(.*\.png.*\) in it"),
        (lambda p: p.write_text("\n\n"), FileNotFoundError, "has no path in it"),
        (lambda p: p.write_text("a.png\nb.png\na.png\n"), ValueError, "1 ids .* twice.*'a.png'"),
        (lambda p: p.write_bytes(b"\xff\xd8\xff\0"), ValueError, "is no list of paths"),
        (lambda p: None, FileNotFoundError, "images: no folder or file"),
    ],
)
def test_lists_that_are_none(tmp_path, make, error, message):
    path = tmp_path / "images.txt"
    make(path)
    with pytest.raises(error, match=message):
        read_image_list(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"file": ["a"]}, "expected a column 'path' in images.csv, got file"),
        ({"path": ["a", "b"], "id": [1, 1]}, "1 ids of images.csv appear twice, the first is 1"),
        ({"path": ["a", None]}, "has rows without a value for 'path'"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, table, message):
    path = tmp_path / "images.csv"
    pd.DataFrame(table).to_csv(path, index=False)
    with pytest.raises(ValueError, match=message):
        read_image_list(path)


def test_bad_shards_and_outputs(settings, image_folder):
    with pytest.raises(ValueError, match="shard: expected 0 to 1 of 2, got 2"):
        extract_images(replace(settings, part=2, parts=2))
    with pytest.raises(NotADirectoryError, match="store: expected a folder"):
        extract_images(replace(settings, store=image_folder / "wren" / "00.png"))
    with pytest.raises(FileExistsError, match="exists and is no store"):
        extract_images(replace(settings, store=image_folder))


def test_lists_with_a_byte_order_mark_and_names_that_are_no_utf_8(image_folder, tmp_path):
    odd = os.fsdecode(b"wr\xe9n.png")
    shutil.copy(image_folder / "wren" / "01.png", tmp_path / odd)
    shutil.copy(image_folder / "wren" / "01.png", tmp_path / "a\u2028b.png")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfwr\xe9n.png\r\n" + "a\u2028b.png\n".encode())
    images = read_image_list(tmp_path / "list.txt")
    assert images.ids == [odd, "a\u2028b.png"]
    assert all(path.is_file() for path in images.paths)
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfpath,id\na.png,007\nNA,NA\n")
    table = read_image_list(tmp_path / "t.csv")
    assert table.ids == ["007", "NA"]
    assert [path.name for path in table.paths] == ["a.png", "NA"]


def test_an_unreadable_image_whose_name_is_no_utf_8_is_known_again(settings, tmp_path):
    folder = tmp_path / "birds"
    shutil.copytree(settings.images, folder)
    odd = os.fsdecode(b"a\xe9.png")
    (folder / odd).write_bytes(b"no image")
    lenient = replace(settings, images=folder, skip_errors=True)
    assert set(extract_images(lenient).skipped) == {odd}
    assert set(read_skipped(settings.store)) == {odd}
    assert extract_images(lenient).stored == 0
    (settings.store / "skipped.csv").write_text("id,row,reason\na.png,x1,no image\n")
    with pytest.raises(ValueError, match=r"skipped\.csv was altered and cannot be read"):
        extract_images(lenient)
