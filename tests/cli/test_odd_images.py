"""Every command that reads images, on files of every kind: sound, strange and unreadable ones."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import odd_images
import pandas as pd
import pytest
import small_data

from emd_retrieval.cli import main

Command = Callable[[Path], list[str]]
SKIPPING = ("evaluate", "extract", "rerank")
# Found by a look at the header, and only by decoding.
DAMAGED = ("zero bytes.png", "cut short.jpg", "pipe.png", "30,000 pixels a side.png")

RETRIEVAL = """
data: {name: odd, classes_train: 1-2, classes_test: 3}
model: {backbone: test_resnet, weights: random, method: fcn, pyramid: [2, 1], embedding_size: 8,
        frozen_trunk: true}
views: {resize: 36, crop: 32, cached: 1}
optimization: {optimizer: adamw, batch_size: 4, images_per_class: 2, steps: 1}
validation: {folds: 0}
loss: {name: contrastive}
"""
FEWSHOT = """
data: {name: folder}
model: {backbone: test_resnet}
views: {resize: 48, crop: 48}
pretraining: {steps: 1, batch_size: 6, learning_rate: 0.02}
validation: {way: 2, queries: 1, episodes: 2}
"""


@pytest.fixture(autouse=True)
def _leave_warnings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Three classes: two of ordinary images, one of every sound kind that there is."""
    folder = small_data.write_images(tmp_path / "odd", classes=("a", "b"), per_class=4)
    (folder / "c").mkdir()
    for name in (*odd_images.SOUND, *odd_images.STRANGE_SIZES):
        odd_images.write(folder / "c", name)
    return folder


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Three classes of four ordinary images."""
    return small_data.write_images(tmp_path / "few", classes=("a", "b", "c"), per_class=4)


@pytest.fixture
def model(weights: Path) -> list[str]:
    return ["--backbone", small_data.BACKBONE, "--weights", str(weights), "--resize", "48",
            "--crop", "48"]  # fmt: skip


@pytest.fixture
def commands(
    tmp_path: Path, model: list[str], weights: Path, image_folder: Path
) -> dict[str, Command]:
    """Each command on a folder of class folders; the image in question is the last of class c."""
    store, plain = tmp_path / "gallery.store", tmp_path / "plain.png"
    odd_images.SOUND["plain.png"](plain)
    assert main(["extract", "--images", str(image_folder), "--store", str(store), *model]) == 0
    (tmp_path / "retrieval.yaml").write_text(RETRIEVAL)
    (tmp_path / "fewshot.yaml").write_text(FEWSHOT)
    cache = ["--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run"), "--device", "cpu"]
    out = ["--output", str(tmp_path / "out")]
    asked = ["--store", str(store), "--weights", str(weights), "-k", "2", "--shortlist", "4", *out]

    def last(folder: Path) -> str:
        known = [f for f in (folder / "c").iterdir() if f.name in odd_images.UNREADABLE]
        return str((known or sorted((folder / "c").iterdir()))[-1])

    def splits(folder: Path) -> str:
        root = folder.parent / "splits"
        root.mkdir()
        for split in ("train", "val", "test"):
            (root / split).symlink_to(folder)
        return str(root)

    return {
        "evaluate": lambda f: ["evaluate", "--data", str(f), *model, "--shortlist", "all", *out],
        "extract": lambda f: ["extract", "--images", str(f), "--store", str(tmp_path / "new.store"),
                              *model],
        "rerank": lambda f: ["rerank", "--queries", str(f), *asked],
        "search": lambda f: ["search", last(f), *asked],
        "explain": lambda f: ["explain", last(f), str(plain), *model, *out],
        "train": lambda f: ["train", str(tmp_path / "retrieval.yaml"), "--data", str(f), *cache],
        "train all layers": lambda f: ["train", str(tmp_path / "retrieval.yaml"),
                                       "model.frozen_trunk=false", "data.classes_train=2-3",
                                       "data.classes_test=1", "--data", str(f), *cache],
        "fewshot": lambda f: ["fewshot", "pretrain", str(tmp_path / "fewshot.yaml"), "--data",
                              splits(f), *cache],
    }  # fmt: skip


def error_of(printed: pytest.CaptureResult[str]) -> str:
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    return lines[0]


BY_FOLDER = ("evaluate", "extract", "rerank", "train", "train all layers", "fewshot")
NAMES = (*BY_FOLDER, "search", "explain")


@pytest.mark.parametrize("name", NAMES)
def test_sound_images_of_every_kind(
    name: str, commands: dict[str, Command], odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*commands[name](odd), "--quiet"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("image", [*odd_images.STRANGE_SIZES, "line\nbreak.png", "-o.png"])
@pytest.mark.parametrize("name", ["search", "explain"])
def test_single_images(
    name: str, image: str, commands: dict[str, Command], few: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for file in (few / "c").iterdir():
        file.unlink()
    odd_images.write(few / "c", image)
    capsys.readouterr()
    assert main([*commands[name](few), "--quiet"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        *((name, image, []) for name in NAMES for image in DAMAGED),
        # A decoding process hands its error over as text, its traceback included.
        *((name, "cut short.jpg", ["--workers", "1"]) for name in BY_FOLDER),
    ],
)
def test_an_unreadable_image_is_one_line(
    name: str, image: str, options: list[str], commands: dict[str, Command], few: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    odd_images.write(few / "c", image)
    capsys.readouterr()
    assert main([*commands[name](few), *options, "--quiet"]) == 2
    told = error_of(capsys.readouterr())
    assert f"c/{image}" in told
    assert "Traceback" not in told
    assert "UnreadableImageError" not in told
    assert len(told) < 400


@pytest.mark.parametrize("name", SKIPPING)
def test_unreadable_images_are_left_out_on_request_and_listed(
    name: str, commands: dict[str, Command], few: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for image in odd_images.UNREADABLE:
        odd_images.write(few / "c", image)
    count = len(odd_images.UNREADABLE)
    capsys.readouterr()
    assert main([*commands[name](few), "--skip-errors", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert str(count) in printed.out
    if name == "evaluate":
        listed = [line.split("left out ")[1].split(": ")[0] for line in printed.err.splitlines()]
    else:
        place = tmp_path / ("new.store" if name == "extract" else "out") / "skipped.csv"
        with place.open(encoding="utf-8", newline="") as file:
            listed = [row["id"] for row in csv.DictReader(file)]
    assert sorted(listed) == sorted(f"c/{image}" for image in odd_images.UNREADABLE)


def test_names_come_through(commands: dict[str, Command], odd: Path, tmp_path: Path) -> None:
    """Every name, with its quotes and line breaks, is the same in the answer's file."""
    assert main([*commands["rerank"](odd), "--format", "csv", "--quiet"]) == 0
    queries = set(pd.read_csv(tmp_path / "out" / "ranking.csv")["query"])
    assert {f"c/{name}" for name in (*odd_images.SOUND, *odd_images.STRANGE_SIZES)} <= queries
