"""The few-shot data sets, on small trees in each official layout, and on the real ones."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emd_retrieval.datasets.cifar import load_cifar100, load_cifar_fs, load_fc100
from emd_retrieval.datasets.fewshot import FEWSHOT_DATASETS, load_cub_fewshot, load_fewshot
from emd_retrieval.datasets.fewshot_splits import SPLITS, class_lists
from emd_retrieval.datasets.imagenet_fewshot import load_mini_imagenet, load_tiered_imagenet

# Fine classes with their super-classes; "bed" and "leopard" are CIFAR-FS test, "seal" its train.
GROUPS = {
    "leopard": "large_carnivores",
    "bed": "household_furniture",
    "baby": "people",
    "seal": "aquatic_mammals",
}


def write_image(file: Path, colour: int = 0, size: tuple[int, int] = (100, 90)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(file)


def write_cifar(root: Path, *, reverse: bool = False, as_bytes: bool = False) -> Path:
    """Four classes, three training and one test image each; red says which: 10 * class + number."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    fine, coarse = list(GROUPS), sorted(set(GROUPS.values()))

    def text(value: str) -> str | bytes:
        return value.encode() if as_bytes else value

    for part, numbers in (("train", [0, 1, 2]), ("test", [3])):
        rows = [(label, number) for number in numbers for label in range(4)]
        rows = rows[::-1] if reverse else rows
        data = np.zeros((len(rows), 3, 32, 32), np.uint8)
        for row, (label, number) in enumerate(rows):
            data[row, 0] = 10 * label + number
        batch = {
            "data": data.reshape(-1, 3072),
            "fine_labels": [label for label, _ in rows],
            "coarse_labels": [coarse.index(GROUPS[fine[label]]) for label, _ in rows],
            "filenames": [text(f"{fine[label]}_{number}.png") for label, number in rows],
        }
        content = {text(key): value for key, value in batch.items()}
        (folder / part).write_bytes(pickle.dumps(content, 2))
    meta = {"fine_label_names": [text(n) for n in fine], "coarse_label_names": coarse}
    (folder / "meta").write_bytes(pickle.dumps(meta, 2))
    return folder


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_cifar100_whatever_the_order_and_the_python(
    tmp_path: Path, reverse: bool, as_bytes: bool
) -> None:
    folder = write_cifar(tmp_path, reverse=reverse, as_bytes=as_bytes)
    for root in (tmp_path, folder):
        images = load_cifar100(root)
        assert images.class_names == ("baby", "bed", "leopard", "seal")
        assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
        reds = [images.load(i).getpixel((5, 7)) for i in range(16)]
        # Training images come after "test/..." in the order of names.
        assert reds == [(10 * c + n, 0, 0) for c in (2, 1, 0, 3) for n in (3, 0, 1, 2)]
        assert images.settings["super_classes"] == GROUPS


def test_divisions_of_the_ordinary_cifar(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    test = load_cifar_fs(tmp_path, "test")
    assert (test.name, test.class_names) == ("CIFAR-FS test", ("baby", "bed", "leopard"))
    assert load_cifar_fs(tmp_path, "train").class_names == ("seal",)
    assert load_fc100(tmp_path, "train").class_names == ("bed",)
    assert load_fc100(tmp_path, "val").class_names == ("leopard",)
    assert load_fewshot("fc100", tmp_path, "test").class_names == ("baby", "seal")
    assert len(load_fc100(tmp_path, "test")) == 8


def test_class_lists_are_whole_and_disjoint() -> None:
    counts = {
        name: [len(class_lists(name)[s]) for s in SPLITS] for name in ("cifar_fs", "fc100", "cub")
    }
    assert counts == {"cifar_fs": [64, 16, 20], "fc100": [12, 4, 4], "cub": [100, 50, 50]}
    for name, (train, val, test) in counts.items():
        assert len(set().union(*class_lists(name).values())) == train + val + test


@pytest.mark.parametrize("place", ["data", "cifar100/data"])
def test_cifar_fs_release_of_class_folders(tmp_path: Path, place: str) -> None:
    """All hundred folders lie in one; the class lists of the package divide them."""
    for names in class_lists("cifar_fs").values():
        for name in names:
            write_image(tmp_path / place / name / "1.png", size=(32, 32))
    assert load_cifar_fs(tmp_path, "val").class_names == tuple(
        sorted(class_lists("cifar_fs")["val"])
    )


@pytest.mark.parametrize(("load", "prefix"), [(load_cifar_fs, "CIFAR_FS"), (load_fc100, "FC100")])
def test_releases_as_pickles(tmp_path: Path, load, prefix: str) -> None:  # type: ignore[no-untyped-def]
    data = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    content = {"data": data, "labels": [40, 7, 40, 7]}
    (tmp_path / f"{prefix}_val.pickle").write_bytes(pickle.dumps(content, 2))
    images = load(tmp_path, "val")
    assert images.class_names == ("7", "40")
    assert [images.load(i).getpixel((0, 0))[0] for i in range(4)] == [1, 3, 0, 2]
    with pytest.raises(FileNotFoundError, match="no folder train with class folders"):
        load(tmp_path, "train")


@pytest.mark.parametrize("prefix", ["", "meta-"])
@pytest.mark.parametrize("name", ["cifar_fs", "fc100", "tiered_imagenet", "folder"])
def test_trees_of_class_folders(tmp_path: Path, name: str, prefix: str) -> None:
    for split in ("train", "test"):
        for label in ("wren", "auk"):
            for number in (2, 1):
                write_image(tmp_path / f"{prefix}{split}" / label / f"{number}.png")
    images = load_fewshot(name, tmp_path, "test")
    assert images.class_names == ("auk", "wren")
    assert [images.image_name(i) for i in range(4)] == [
        "auk/1.png", "auk/2.png", "wren/1.png", "wren/2.png",
    ]  # fmt: skip
    assert images.load(0).size == (100, 90)
    with pytest.raises(FileNotFoundError, match=r"no folder val .*there are train and test"):
        load_fewshot(name, tmp_path, "val")


@pytest.mark.parametrize("place", [".", "split", "splits"])
def test_mini_imagenet(tmp_path: Path, place: str) -> None:
    rows = [("n02", "b.jpg"), ("n01", "d.jpg"), ("n02", "a.jpg"), ("n01", "c.jpg")]
    (tmp_path / place).mkdir(exist_ok=True)
    table = tmp_path / place / "test.csv"
    table.write_text("filename,label\n" + "".join(f"{f},{label}\n" for label, f in rows))
    for _, file in rows:
        write_image(tmp_path / "images" / file, size=(500, 375))
    images = load_mini_imagenet(tmp_path, "test")
    assert images.class_names == ("n01", "n02")
    assert [images.image_name(i) for i in range(4)] == ["c.jpg", "d.jpg", "a.jpg", "b.jpg"]
    assert images.load(0).size == (500, 375)
    with pytest.raises(FileNotFoundError, match=r"train.csv not found; expected a folder images"):
        load_mini_imagenet(tmp_path, "train")
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 images .*: a.jpg$"):
        load_mini_imagenet(tmp_path, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na.jpg,n01\n", "expected the columns filename and label"),
        ("filename,label\na.jpg,\n", "line 2: file name or label missing"),
        ("filename,label\n../a.jpg,n01\n", "expected a plain file name"),
        ("filename,label\n", "lists no image"),
    ],
)
def test_mini_imagenet_tables_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "val.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_mini_imagenet(tmp_path, "val")


def test_shrunk_copies_are_warned_of(tmp_path: Path) -> None:
    for number in range(20):
        write_image(tmp_path / "test" / "auk" / f"{number}.jpg", size=(84, 84))
    with pytest.warns(UserWarning, match="shrunk to 84 x 84"):
        load_tiered_imagenet(tmp_path, "test")
    write_image(tmp_path / "test" / "auk" / "0.jpg", size=(400, 84))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tiered_imagenet(tmp_path, "test")


def test_cub_takes_the_species_that_are_there(tmp_path: Path) -> None:
    names = {1: "001.Black_footed_Albatross", 3: "003.Sooty_Albatross", 4: "004.Groove_billed_Ani"}
    for name in names.values():
        write_image(tmp_path / "images" / name / "1.jpg")
    lines = {
        "images.txt": [f"{i} {name}/1.jpg" for i, name in names.items()],
        "image_class_labels.txt": [f"{i} {i}" for i in names],
        "classes.txt": [f"{i} {name}" for i, name in names.items()],
    }
    for file, content in lines.items():
        (tmp_path / file).write_text("\n".join(content) + "\n")
    train = load_cub_fewshot(tmp_path, "train")
    assert train.class_names == (names[1], names[3])
    assert train.name == "CUB few-shot train"
    assert len(load_cub_fewshot(tmp_path, "test")) == 1
    with pytest.raises(FileNotFoundError, match="none of the 50 species of the split 'val'"):
        load_cub_fewshot(tmp_path, "val")


@pytest.mark.parametrize("name", FEWSHOT_DATASETS)
def test_absent_data_says_what_to_fetch(tmp_path: Path, name: str) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"(expected|comes from|not found)"):
            load_fewshot(name, root, "train")


@pytest.mark.parametrize("name", FEWSHOT_DATASETS)
def test_splits_have_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"split: expected one of train, val, test; got 'valid'"):
        load_fewshot(name, tmp_path, "valid")


def test_data_sets_have_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'mini_imagenet'"):
        load_fewshot("miniimagenet", tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((16, 5), np.uint8)}, r"uint8 of shape \[n, 3072\]"),
        ({"fine_labels": [0, 1]}, "expected 12 whole numbers under 'fine_labels'"),
        ({"fine_labels": [9] * 12}, "fine_labels outside 0 to 3"),
        ({"filenames": None}, "expected a list under 'filenames'"),
    ],
)
def test_cifar_that_is_none(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write_cifar(tmp_path)
    content = pickle.loads((folder / "train").read_bytes())  # noqa: S301 (written just now)
    (folder / "train").write_bytes(pickle.dumps({**content, **change}, 2))
    with pytest.raises(ValueError, match=message):
        load_cifar100(tmp_path)
    (folder / "meta").unlink()
    with pytest.raises(FileNotFoundError, match="meta not found; expected the folder cifar-100"):
        load_cifar100(tmp_path)


@pytest.mark.data
def test_the_real_cub_by_its_few_shot_split(cub_root: Path) -> None:
    counts = [load_cub_fewshot(cub_root, split).num_classes for split in SPLITS]
    assert counts == [25, 13, 12]


@pytest.fixture(scope="module")
def real_cifar(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = data_root / "data" / "restore_cifar100.py"
    if not script.is_file():
        pytest.skip(f"real data: no data/{script.name}")
    folder = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.data
@pytest.mark.slow
def test_the_real_cifar_by_its_few_shot_splits(real_cifar: Path) -> None:
    for name, classes in (("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])):
        parts = [load_fewshot(name, real_cifar, split) for split in SPLITS]
        assert [part.num_classes for part in parts] == classes
        assert sum(map(len, parts)) == 60_000
        assert all(np.all(np.bincount(part.labels) == 600) for part in parts)
