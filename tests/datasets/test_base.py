"""Collections: class specs, subsets, identity, and which of their images are sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from emd_retrieval.datasets import (
    ImageCollection,
    ImageDataset,
    UnreadableImageError,
    check_readable,
    find_unreadable,
    load_image_folder,
    path_below,
)
from emd_retrieval.datasets.base import class_numbers_of

CLASSES = ("001.Auk", "002.Bunting", "005.Crow", "009.Dove")


@pytest.fixture
def birds() -> ImageCollection:
    """Two images of each class; every pixel of image i has the value i."""
    pixels = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((6, 5, 3), np.uint8)
    return ImageCollection("birds", pixels, np.arange(8) // 2, CLASSES, (1, 2, 5, 9))


class TestImageCollection:
    def test_rejects_what_does_not_fit(self, birds: ImageCollection) -> None:
        with pytest.raises(
            ValueError, match=r"images: expected uint8 .* got float64 \[2, 4, 4, 3\]"
        ):
            ImageCollection("x", np.zeros((2, 4, 4, 3)), np.zeros(2, int), ("a",), (1,))
        with pytest.raises(ValueError, match="labels: expected 8 integers"):
            ImageCollection("x", birds.images, np.zeros(7, int), ("a",), (1,))
        with pytest.raises(
            ValueError, match="labels: expected 0 to 0 for 1 class names, got 0 to 3"
        ):
            ImageCollection("x", birds.images, birds.labels, ("a",), (1,))
        with pytest.raises(ValueError, match="class_numbers: expected one a class name"):
            ImageCollection("x", birds.images, birds.labels, CLASSES, (1, 2))

    def test_labels_belong_to_the_collection(self) -> None:
        labels = np.array([0, 1])
        birds = ImageCollection("x", np.zeros((2, 4, 4, 3), np.uint8), labels, ("a", "b"), (1, 2))
        labels[0] = 1
        assert birds.labels.tolist() == [0, 1]
        with pytest.raises(ValueError, match="read-only"):
            birds.labels[0] = 1

    @pytest.mark.parametrize(
        ("indices", "expected"),
        [([5, 0], [5, 0]), ([], []), ([-1], [7]), (np.arange(8) % 3 == 0, [0, 3, 6])],
    )
    def test_subset(self, birds: ImageCollection, indices: list[int], expected: list[int]) -> None:
        part = birds.subset(indices)
        assert [part.load(i).getpixel((0, 0))[0] for i in range(len(part))] == expected
        assert part.labels.tolist() == [i // 2 for i in expected]
        assert part.class_names == CLASSES

    def test_subset_out_of_range(self, birds: ImageCollection) -> None:
        with pytest.raises(IndexError):
            birds.subset([8])

    @pytest.mark.parametrize(
        ("count", "expected"), [(1, [0, 2, 5, 6]), (2, [0, 1, 2, 3, 5, 6, 7]), (9, "all")]
    )
    def test_first_of_each_class(
        self, birds: ImageCollection, count: int, expected: object
    ) -> None:
        uneven = birds.subset([0, 1, 2, 3, 5, 6, 7])
        part = uneven.first_of_each_class(count)
        values = [part.load(i).getpixel((0, 0))[0] for i in range(len(part))]
        assert values == ([0, 1, 2, 3, 5, 6, 7] if expected == "all" else expected)
        assert part.class_names == CLASSES

    def test_first_of_each_class_refuses_none(self, birds: ImageCollection) -> None:
        with pytest.raises(ValueError, match="count: expected"):
            birds.first_of_each_class(0)

    @pytest.mark.parametrize(
        ("spec", "chosen"),
        [
            ("1-2", [0, 1]),
            ("9, 5", [2, 3]),
            ("1,2,5", [0, 1, 2]),
            ("5-5", [2]),
            ("005.Crow,1", [0, 2]),
            (["002.Bunting", 9], [1, 3]),
            ([1, 1], [0]),
        ],
    )
    def test_select_classes(
        self, birds: ImageCollection, spec: str | list[str | int], chosen: list[int]
    ) -> None:
        part = birds.select_classes(spec)
        assert part.class_names == tuple(CLASSES[i] for i in chosen)
        assert part.class_numbers == tuple((1, 2, 5, 9)[i] for i in chosen)
        assert part.labels.tolist() == np.repeat(np.arange(len(chosen)), 2).tolist()
        assert [part.load(i).getpixel((0, 0))[0] // 2 for i in (0, -1)] == [chosen[0], chosen[-1]]

    def test_numbers_stay_with_their_classes(self, birds: ImageCollection) -> None:
        assert birds.select_classes("5,9").select_classes("9").class_names == ("009.Dove",)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("1-4", r"classes are not here: 3-4; birds has classes 1-2,5,9"),
            ("7", r"class is not here: 7;"),
            ("9-5", r"range '9-5' runs backwards; write 5-9"),
            ("1-999999999", r"range '1-999999999' is wider"),
            ("002.Buntin", r"got '002.Buntin', .* did you mean '002.Bunting'"),
            ("", r"got '', which is no class"),
            ("1,,2", r"got ''"),
            ("-3", r"got '-3'"),
            ("²", r"got '²'"),
            ([], r"expected at least one class, got \[\]"),
        ],
    )
    def test_select_classes_refuses(
        self, birds: ImageCollection, spec: str | list[str], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            birds.select_classes(spec)

    def test_selected_classes_without_images(self, birds: ImageCollection) -> None:
        with pytest.raises(ValueError, match="selects classes of birds without images"):
            birds.subset([0, 1]).select_classes("9")

    def test_describe_tells_collections_apart(self, birds: ImageCollection) -> None:
        described = birds.select_classes("1-2,9").describe()
        assert described["name"] == "birds"
        assert (described["images"], described["num_classes"]) == (6, 3)
        assert described["classes"] == "1-2,9"
        variants = [birds, birds.subset(range(7)), birds.subset([1, 0, *range(2, 8)])]
        brighter = ImageCollection("birds", birds.images + 1, birds.labels, CLASSES, (1, 2, 5, 9))
        digests = {variant.describe()["sha256"] for variant in [*variants, brighter]}
        assert len(digests) == 4
        assert birds.subset(range(8)).describe() == birds.describe()

    def test_identity_of_files_does_not_depend_on_where_they_lie(self, tmp_path: Path) -> None:
        digests = []
        for place in ("here", "there"):
            (tmp_path / place / "set" / "a").mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / place / "set" / "a" / "1.png")
            digests.append(load_image_folder(tmp_path / place / "set").describe())
        assert digests[0] == digests[1]
        with (tmp_path / "there" / "set" / "a" / "1.png").open("ab") as file:
            file.write(b"x")
        assert load_image_folder(tmp_path / "there" / "set").describe() != digests[0]


def test_class_numbers() -> None:
    assert class_numbers_of(["b", "10", "a"]) == [(1, "10"), (2, "a"), (3, "b")]
    assert class_numbers_of(["10", "9", "0"]) == [(0, "0"), (9, "9"), (10, "10")]
    # "1" and "01" are one number: ranks keep them apart.
    assert class_numbers_of(["1", "01"]) == [(1, "01"), (2, "1")]


def test_dataset_serves_image_label_and_index(birds: ImageCollection) -> None:
    plain = ImageDataset(birds)
    assert len(plain) == 8
    image, label, index = plain[5]
    assert (image.size, image.mode, label, index) == ((5, 6), "RGB", 2, 5)

    dataset = ImageDataset(birds, lambda image: torch.from_numpy(np.array(image)))
    images, labels, indices = next(iter(DataLoader(dataset, batch_size=8)))
    assert images.shape == (8, 6, 5, 3)
    assert images[:, 0, 0, 0].tolist() == indices.tolist() == list(range(8))
    assert labels.tolist() == birds.labels.tolist()


class TestCheckReadable:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "a").mkdir()
        for number in range(4):
            noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "a" / f"{number}.png")
        return tmp_path

    def test_sound_images_pass(self, folder: Path) -> None:
        collection = load_image_folder(folder)
        checked, unreadable = check_readable(collection, decode=True)
        assert checked is collection
        assert unreadable == []

    def test_header_check_finds_foreign_and_empty_files(self, folder: Path) -> None:
        (folder / "a" / "1.png").write_text("no image")
        (folder / "a" / "3.png").write_bytes(b"")
        found = find_unreadable(load_image_folder(folder))
        assert [(bad.index, bad.name) for bad in found] == [(1, "a/1.png"), (3, "a/3.png")]
        assert "not an image" in found[0].reason

    def test_full_decode_finds_truncation(self, folder: Path) -> None:
        whole = (folder / "a" / "2.png").read_bytes()
        (folder / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
        collection = load_image_folder(folder)
        assert find_unreadable(collection) == []
        assert [bad.name for bad in find_unreadable(collection, decode=True)] == ["a/2.png"]

    def test_raises_or_skips_on_request(self, folder: Path) -> None:
        (folder / "a" / "1.png").write_text("no image")
        collection = load_image_folder(folder)
        with pytest.raises(UnreadableImageError, match=r"1 of 4 images .* a/1\.png \(not an image"):
            check_readable(collection)
        rest, unreadable = check_readable(collection, skip_errors=True)
        assert [rest.image_name(i) for i in range(3)] == ["a/0.png", "a/2.png", "a/3.png"]
        assert [bad.index for bad in unreadable] == [1]

    def test_nothing_readable_is_an_error_even_when_skipping(self, folder: Path) -> None:
        for number in range(4):
            (folder / "a" / f"{number}.png").write_text("no image")
        with pytest.raises(UnreadableImageError, match="4 of 4 images"):
            check_readable(load_image_folder(folder), skip_errors=True)

    def test_images_in_memory_need_no_check(self, birds: ImageCollection) -> None:
        assert check_readable(birds) == (birds, [])


class TestPathBelow:
    @pytest.mark.parametrize("name", ["a.png", "sub/a.png", "./a.png", "..a.png"])
    def test_names_in_the_folder(self, tmp_path: Path, name: str) -> None:
        assert path_below(tmp_path, name) == tmp_path / name
        assert path_below(tmp_path, str(tmp_path / name)) == tmp_path / name

    @pytest.mark.parametrize(
        "name", ["../a.png", "sub/../../a.png", "sub/../a.png", "/etc/passwd", "//host/a", ".."]
    )
    def test_names_that_lead_out(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"expected a file below .*, got '.*'; move the list"):
            path_below(tmp_path, name)

    def test_links_in_the_folder_are_followed(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "shared").mkdir()
        (tmp_path / "set" / "images").symlink_to(tmp_path / "shared")
        assert path_below(tmp_path / "set", "images/a.png").parent.resolve().name == "shared"

    def test_a_relative_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert path_below(Path(), str(tmp_path / "a.png")) == tmp_path / "a.png"
        assert path_below(Path("set"), "a.png") == Path("set/a.png")
