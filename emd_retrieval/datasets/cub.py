"""CUB-200-2011 in its official layout: index files in the root, pictures below ``images/``.

A copy that holds only some of the 200 classes works as well, as long as its index files agree.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emd_retrieval.datasets.base import ClassSpec, ImageCollection, path_below

_FOLDER = "CUB_200_2011"
_INDEX_FILES = ("images.txt", "image_class_labels.txt", "classes.txt")
_SOURCE = (
    "CUB-200-2011 comes from the Caltech-UCSD Birds page of the Caltech Vision Lab, as the "
    f"archive {_FOLDER}.tgz; unpack it and give the folder {_FOLDER}"
)


def is_cub(path: Path) -> bool:
    """Whether a folder, or a ``CUB_200_2011`` folder in it, has one of CUB's image index files."""
    return any(
        (path / folder / name).is_file() for folder in (".", _FOLDER) for name in _INDEX_FILES[:2]
    )


def load_cub(root: str | Path, classes: ClassSpec | None = None) -> ImageCollection:
    """Load CUB-200-2011 with the labels, names and order of its index files.

    The train/test split and the bounding boxes of the release are not used: retrieval splits by
    class (1-100 train, 101-200 test) on whole images.

    Args:
        root: The folder ``CUB_200_2011`` or the one it lies in.
        classes: Class numbers as in ``classes.txt`` (``"101-200"``) or names; ``None`` for all.

    Returns:
        The collection, labels from 0 in the order of class numbers.

    Raises:
        FileNotFoundError: If the folder, an index file, or an image of the chosen classes is
            missing.
        ValueError: If an index file cannot be read or they disagree, or ``classes`` does not fit.
    """
    root = _find_root(Path(root))
    names = _read_index(root / "classes.txt")
    files = _read_index(root / "images.txt")
    class_of = {
        i: _to_int(v, root) for i, v in _read_index(root / "image_class_labels.txt").items()
    }
    if not files:
        raise ValueError(f"{root / 'images.txt'} lists no image. {_SOURCE}")
    for image, file in files.items():
        if class_of.get(image) not in names:
            told = "no class" if image not in class_of else f"class {class_of[image]}"
            raise ValueError(
                f"image {image} ({file}) has {told} in image_class_labels.txt, which classes.txt "
                f"does not list; the index files in {root} are not of one release"
            )
    numbers = sorted(names)
    label_of = {number: label for label, number in enumerate(numbers)}
    ids = sorted(files)
    collection = ImageCollection(
        name="CUB-200-2011",
        images=tuple(_image(root, files[i]) for i in ids),
        labels=np.array([label_of[class_of[i]] for i in ids], dtype=np.int64),
        class_names=tuple(names[number] for number in numbers),
        class_numbers=tuple(numbers),
        root=root / "images",
    )
    if classes is not None:
        collection = collection.select_classes(classes)
    _check_present(collection)
    return collection


def _find_root(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder. {_SOURCE}")
    if not any(path.iterdir()):
        raise FileNotFoundError(f"{path}: the folder is empty. {_SOURCE}")
    if not (path / "images.txt").is_file() and (path / _FOLDER).is_dir():
        path = path / _FOLDER
    missing = [name for name in (*_INDEX_FILES, "images") if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(f"{path}: {', '.join(missing)} not found. {_SOURCE}")
    return path


def _read_index(path: Path) -> dict[int, str]:
    """Read lines of ``<number> <value>``."""
    entries: dict[int, str] = {}
    with path.open(encoding="utf-8") as lines:
        for count, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            number, _, value = line.strip().partition(" ")
            if not number.isdecimal() or not value:
                raise ValueError(
                    f"{path}, line {count}: expected '<number> <value>', got {line.strip()!r}"
                )
            if int(number) in entries:
                raise ValueError(f"{path}, line {count}: number {number} appears twice")
            entries[int(number)] = value.strip()
    return entries


def _image(root: Path, name: str) -> Path:
    try:
        return path_below(root / "images", name)
    except ValueError as error:
        raise ValueError(f"{root / 'images.txt'}: {error}") from None


def _to_int(value: str, root: Path) -> int:
    if not value.isdecimal():
        path = root / "image_class_labels.txt"
        raise ValueError(f"{path}: expected a class number, got {value!r}")
    return int(value)


def _check_present(collection: ImageCollection) -> None:
    absent = [i for i, path in enumerate(collection.images) if not Path(path).is_file()]
    if not absent:
        return
    shown = ", ".join(collection.image_name(i) for i in absent[:3])
    raise FileNotFoundError(
        f"{len(absent)} of the {len(collection)} images that images.txt lists are not below "
        f"{collection.root}: {shown}{', ...' if len(absent) > 3 else ''}. "
        f"Unpack the archive again, or choose classes that are there"
    )
