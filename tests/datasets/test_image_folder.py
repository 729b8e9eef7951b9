"""Folders of class sub-folders: what counts as an image or a class, links, writing them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emd_retrieval.datasets import (
    ImageCollection,
    UnreadableImageError,
    load_image_folder,
    load_images,
    save_image_folder,
)


def add_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def names(collection: ImageCollection) -> list[str]:
    return [collection.image_name(i) for i in range(len(collection))]


def test_nested_files_sorted_by_class_and_path(tmp_path: Path) -> None:
    for file in ("wren/b.png", "wren/a/2.JPG", "robin/z.webp", "robin/deep/er/1.tiff"):
        add_image(tmp_path / file)
    birds = load_images(tmp_path)
    assert birds.class_names == ("robin", "wren")
    assert names(birds) == ["robin/deep/er/1.tiff", "robin/z.webp", "wren/a/2.JPG", "wren/b.png"]
    assert birds.labels.tolist() == [0, 0, 1, 1]
    assert birds.name == tmp_path.name
    assert load_images(tmp_path, classes="2").class_names == ("wren",)
    assert load_images(str(tmp_path), classes="robin").class_names == ("robin",)


def test_number_folders_are_their_own_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        add_image(tmp_path / str(number) / "a.png")
    birds = load_image_folder(tmp_path)
    assert birds.class_names == ("0", "2", "10")
    assert load_image_folder(tmp_path, classes="10").class_names == ("10",)


def test_hidden_foreign_and_empty_are_passed_over(tmp_path: Path) -> None:
    add_image(tmp_path / "wren" / "a.png")
    for file in (".hidden/a.png", "wren/.thumb.png", "wren/.cache/b.png", "loose.png"):
        add_image(tmp_path / file)
    (tmp_path / "wren" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    birds = load_image_folder(tmp_path)
    assert names(birds) == ["wren/a.png"]
    assert birds.class_names == ("wren",)


def test_symbolic_links(tmp_path: Path) -> None:
    add_image(tmp_path / "elsewhere" / "a.png")
    add_image(tmp_path / "set" / "robin" / "b.png")
    (tmp_path / "set" / "wren").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "robin" / "c.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    # Loops: from a class to the set, and from the set to itself.
    (tmp_path / "set" / "robin" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "all").symlink_to(tmp_path / "set")
    birds = load_image_folder(tmp_path / "set")
    assert names(birds) == ["robin/b.png", "robin/c.png", "wren/a.png"]


def test_errors_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; expected one sub-folder a class"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="the folder is empty"):
        load_images(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_images(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="1 files but no sub-folders"):
        load_images(tmp_path)
    (tmp_path / "wren").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image in its 1 sub-folders; .*\.jpeg"):
        load_images(tmp_path)


class TestSaving:
    def test_round_trip(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
        birds = ImageCollection("x", pixels, np.array([1, 0, 1, 1, 0]), ("a", "b"), (1, 2))
        folder = save_image_folder(birds, tmp_path / "new" / "set")
        read = load_images(folder)
        assert names(read) == ["a/0001.png", "a/0002.png", "b/0001.png", "b/0002.png", "b/0003.png"]
        again = np.stack([np.asarray(read.load(i)) for i in range(5)])
        np.testing.assert_array_equal(again, pixels[[1, 4, 0, 2, 3]])
        assert list((tmp_path / "new").iterdir()) == [folder]

    def test_never_writes_into_what_is_there(self, tmp_path: Path) -> None:
        birds = ImageCollection("x", np.zeros((1, 8, 8, 3), np.uint8), np.array([0]), ("a",), (1,))
        (tmp_path / "set").mkdir()
        save_image_folder(birds, tmp_path / "set")
        with pytest.raises(FileExistsError, match="not an empty folder"):
            save_image_folder(birds, tmp_path / "set")

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path) -> None:
        add_image(tmp_path / "set" / "a" / "1.png")
        (tmp_path / "set" / "a" / "2.png").write_text("broken")
        with pytest.raises(UnreadableImageError):
            save_image_folder(load_images(tmp_path / "set"), tmp_path / "copy")
        assert [path.name for path in tmp_path.iterdir()] == ["set"]

    @pytest.mark.parametrize("name", ["a/b", "..", "", "a:b"])
    def test_class_names_that_are_no_folder_names(self, tmp_path: Path, name: str) -> None:
        birds = ImageCollection("x", np.zeros((1, 8, 8, 3), np.uint8), np.array([0]), (name,), (1,))
        with pytest.raises(ValueError, match="cannot be the name of a folder"):
            save_image_folder(birds, tmp_path / "set")
