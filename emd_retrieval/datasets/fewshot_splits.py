"""What the few-shot data sets share: three splits, class lists, and trees of class folders."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

from emd_retrieval._checks import check_choice
from emd_retrieval.datasets.base import ImageCollection
from emd_retrieval.datasets.decoding import image_size
from emd_retrieval.datasets.image_folder import load_image_folder

SPLITS = ("train", "val", "test")

# Copies shrunk to the input size of the day lose some 9 points on miniImageNet.
_SHRUNK = 84
_LOOKED_AT = 8


def check_split(split: str) -> None:
    """Raise ``ValueError`` unless ``split`` is train, val or test."""
    check_choice("split", split, SPLITS)


@cache
def class_lists(name: str) -> dict[str, tuple[str, ...]]:
    """Class names of each split: ``"cifar_fs"``, ``"cub"``, or super-classes of ``"fc100"``.

    >>> {split: len(names) for split, names in class_lists("cifar_fs").items()}
    {'train': 64, 'val': 16, 'test': 20}
    """
    text = resources.files("emd_retrieval.datasets").joinpath("splits", f"{name}.json").read_text()
    return {split: tuple(names) for split, names in json.loads(text).items()}


def split_folder(root: Path, split: str, name: str, source: str) -> ImageCollection:
    """Load the class folders below ``root/train`` and so on (or ``root/meta-train``).

    Args:
        root: The folder of the three.
        split: Which.
        name: Of the collection.
        source: What to fetch where there is nothing.

    Raises:
        FileNotFoundError: If the split is not there.
    """
    check_split(split)
    if not root.is_dir() or not any(root.iterdir()):
        what = "the folder is empty" if root.is_dir() else "no such folder"
        raise FileNotFoundError(f"{root}: {what}; {source}")
    for folder in (root / split, root / f"meta-{split}"):
        if folder.is_dir():
            return replace(load_image_folder(folder), name=name)
    here = [s for s in SPLITS if any((root / f"{p}{s}").is_dir() for p in ("", "meta-"))]
    told = f"there are {' and '.join(here)}" if here else "there is none of the three splits"
    raise FileNotFoundError(
        f"{root}: no folder {split} with class folders inside; {told}; {source}"
    )


def warn_if_shrunk(collection: ImageCollection) -> None:
    """Warn where the images seem to be copies shrunk to 84 x 84, which cost accuracy."""
    files = [image for image in collection.images if isinstance(image, Path)]
    sizes = [max(image_size(file)) for file in files[:: max(1, len(files) // _LOOKED_AT)]]
    if sizes and max(sizes) <= _SHRUNK:
        warnings.warn(
            f"{collection.name}: the images are at most {max(sizes)} pixels wide and high, as in "
            f"copies shrunk to {_SHRUNK} x {_SHRUNK}; training on these loses some 9 points of "
            "accuracy. Use the images at their original resolution",
            stacklevel=3,
        )
