"""CUB's official layout, on small trees drawn up here and on the real data where it is present."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emd_retrieval.datasets import load_cub, load_images

NAMES = {1: "001.Auk", 2: "002.Bunting", 12: "012.Crow"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, out of order in the index, numbered as in a partial copy."""
    root = tmp_path / "CUB_200_2011"
    rows = [(1, 12, "Crow_1.jpg"), (2, 1, "Auk_7.jpg"), (10, 1, "Auk_2.jpg"), (3, 2, "Bunting.jpg")]
    for _, number, file in rows:
        (root / "images" / NAMES[number]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / "images" / NAMES[number] / file)
    lines = {
        "images.txt": [f"{i} {NAMES[number]}/{file}" for i, number, file in rows],
        "image_class_labels.txt": [f"{i} {number}" for i, number, _ in reversed(rows)],
        "classes.txt": [f"{number} {name}" for number, name in NAMES.items()],
        "train_test_split.txt": [f"{i} 1" for i, *_ in rows],
        "bounding_boxes.txt": [f"{i} 0.0 0.0 8.0 8.0" for i, *_ in rows],
    }
    for file, content in lines.items():
        (root / file).write_text("\n".join(content) + "\n")
    return root


@pytest.mark.parametrize("where", ["root", "parent"])
@pytest.mark.parametrize("load", [load_cub, load_images])
def test_order_and_labels_are_those_of_the_index(root: Path, where: str, load) -> None:  # type: ignore[no-untyped-def]
    birds = load(root if where == "root" else root.parent)
    assert birds.name == "CUB-200-2011"
    assert [birds.image_name(i) for i in range(4)] == [
        "001.Auk/Auk_7.jpg" if i == 1 else name
        for i, name in enumerate(
            ["012.Crow/Crow_1.jpg", "", "002.Bunting/Bunting.jpg", "001.Auk/Auk_2.jpg"]
        )
    ]
    assert birds.labels.tolist() == [2, 0, 1, 0]
    assert birds.class_numbers == (1, 2, 12)
    assert birds.load(0).size == (8, 8)


def test_classes_go_by_their_own_number(root: Path) -> None:
    birds = load_cub(root, classes="2,12")
    assert birds.class_names == ("002.Bunting", "012.Crow")
    assert birds.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="not here: 3-11; CUB-200-2011 has classes 1-2,12"):
        load_cub(root, classes="2-12")


def test_missing_and_empty_folders_say_where_cub_comes_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder\. CUB-200-2011 comes"):
        load_cub(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="the folder is empty"):
        load_cub(tmp_path)


@pytest.mark.parametrize("file", ["images.txt", "image_class_labels.txt", "classes.txt"])
def test_missing_index_file(root: Path, file: str) -> None:
    (root / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"CUB_200_2011: {file} not found"):
        load_images(root)


def test_absent_images_are_counted_and_named(root: Path) -> None:
    (root / "images" / "001.Auk" / "Auk_2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 images .* 001\.Auk/Auk_2\.jpg"):
        load_cub(root)
    # Classes that are whole still load.
    assert len(load_cub(root, classes="2,12")) == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images.txt", "", "lists no image"),
        ("images.txt", "one 001.Auk/a.jpg\n", r"line 1: expected '<number> <value>', got 'one"),
        ("classes.txt", "1 a\n\n2\n", "line 3: expected"),
        ("classes.txt", "1 a\n1 b\n", "line 2: number 1 appears twice"),
        ("image_class_labels.txt", "1 12\n2 x\n", "expected a class number, got 'x'"),
        ("image_class_labels.txt", "1 12\n", r"image 2 \(001\.Auk/Auk_7\.jpg\) has no class"),
        ("image_class_labels.txt", "1 77\n", r"has class 77 .* not of one release"),
    ],
)
def test_broken_index_files(root: Path, file: str, content: str, message: str) -> None:
    (root / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_cub(root)


@pytest.mark.data
def test_partial_copy_of_the_real_data() -> None:
    data = Path(os.environ.get("EMD_RETRIEVAL_DATA", "")) / "data"
    if not (data / "CUB_200_2011" / "images.txt").is_file():
        pytest.skip("the real CUB-200-2011 is not under $EMD_RETRIEVAL_DATA/data")
    birds = load_images(data)
    assert (len(birds), birds.num_classes) == (2889, 50)
    held_out = birds.select_classes("26-50")
    assert len(held_out) == 1487
    assert held_out.class_names[0] == "026.Bronzed_Cowbird"
    # Every file's folder agrees with the label file.
    folders = [held_out.image_name(i).split("/")[0] for i in range(len(held_out))]
    assert folders == [held_out.class_names[label] for label in held_out.labels]
    assert np.asarray(held_out.load(0)).shape[2] == 3


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/secret.png", "a/../../../secret.png"])
def test_the_index_cannot_name_files_elsewhere(root: Path, name: str) -> None:
    index = root / "images.txt"
    first, *others = index.read_text().splitlines()
    index.write_text("\n".join([f"{first.split()[0]} {name}", *others]))
    with pytest.raises(ValueError, match=r"images\.txt: expected a file below .*, got '"):
        load_cub(root)
