"""``emd-retrieval extract`` from the command line, alone and as torchrun starts it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import small_data

from emd_retrieval.cli import main
from emd_retrieval.retrieval import LocalFeatureStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _as_outside(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "birds.store"


@pytest.fixture
def command(image_folder, weights, store):
    return [
        "extract", "--images", str(image_folder), "--store", str(store),
        "--backbone", small_data.BACKBONE, "--weights", str(weights), "--resize", "48",
        "--crop", "48", "--workers", "0",
    ]  # fmt: skip


def test_extract_and_again(command, store, capsys):
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == f"12 images stored in {store}, 0 were there already\n"
    assert printed.err == ""
    assert main(command) == 0
    assert "0 images stored" in capsys.readouterr().out
    manifest = LocalFeatureStore.open(store, verify=True).manifest
    assert (manifest.nodes, manifest.codec, manifest.ids) == (14, "float16", "string")
    assert manifest.global_channels == manifest.channels


def test_options_reach_the_store(command, store):
    options = [
        "--extractor", "grid", "--grid", "2", "--patch-size", "32", "--codec", "int8",
        "--no-global-vectors", "--batch-size", "5", "--bf16", "--seed", "3", "--device", "cpu",
    ]  # fmt: skip
    assert main([*command, *options]) == 0
    manifest = LocalFeatureStore.open(store).manifest
    assert (manifest.nodes, manifest.codec, manifest.global_channels) == (4, "int8", None)
    told = manifest.extractor
    assert (told["extractor"], told["bf16"], told["seed"]) == ("grid", True, 3)


def test_shards(command, store, capsys):
    assert main([*command, "--shard", "1/2"]) == 0
    assert "6 images of shard 1/2 stored" in (out := capsys.readouterr().out)
    assert "once the other shards are done" in out
    assert main([*command, "--shard", "0/2"]) == 0
    assert "all 2 shards are done; the store is whole" in capsys.readouterr().out
    assert len(LocalFeatureStore.open(store)) == 12


@pytest.mark.slow
def test_two_processes_as_torchrun_starts_them(command, store):
    processes = []
    for rank in range(2):
        given = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        started = subprocess.Popen(
            [sys.executable, "-m", "emd_retrieval.cli", *command, "--threads", "1"],
            env={**os.environ, **given, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(started)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    opened = LocalFeatureStore.open(store, verify=True)
    assert len(opened) == 12
    assert [shard.path for shard in opened.manifest.shards] == [
        "part-00000-of-00002/shard-000000", "part-00001-of-00002/shard-000000"
    ]  # fmt: skip


def test_skipped_images_are_counted(command, store, image_folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{image_folder}/wren/00.png\nbroken.png\nmissing.png\n")
    command[2] = str(listed)
    assert main(command) == 2
    assert "broken.png: the file is empty" in capsys.readouterr().err
    assert main([*command, "--skip-errors"]) == 0
    assert "2 unreadable images left out, listed in skipped.csv" in capsys.readouterr().out
    assert "missing.png,0,file not found" in (store / "skipped.csv").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "2/2"], "--shard: expected I/N with I from 0 to N - 1, as in 0/2; got '2/2'"),
        (["--pyramid", "3,x"], "--pyramid: expected sizes as in 3,2,1, got '3,x'"),
        (["--grid", "3"], "--grid goes with --extractor grid, not with fcn"),
        (["--model", "run"], "--backbone does not go with --model, whose recipe says it already"),
        (["--images", "nowhere"], "images: no folder or file 'nowhere'"),
        (["--codec", "int4"], "argument --codec: invalid choice: 'int4'"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used here"),
    ],
)
def test_bad_input_is_one_line(command, options, message, capsys):
    try:
        code = main([*command, *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
