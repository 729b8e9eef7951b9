"""miniImageNet (images and CSV splits) and tieredImageNet (class folders), at full resolution."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from emd_retrieval.datasets.base import ImageCollection
from emd_retrieval.datasets.fewshot_splits import check_split, split_folder, warn_if_shrunk

_MINI_SOURCE = (
    "expected a folder images with the pictures, cut from ImageNet at their original resolution, "
    "and train.csv, val.csv and test.csv (filename,label), beside it or in a folder split"
)
_TIERED_SOURCE = (
    "expected folders train, val and test with a folder of ImageNet pictures for each class"
)


def load_mini_imagenet(root: str | Path, split: str) -> ImageCollection:
    """Load a split of miniImageNet: 64, 16 and 20 classes of 600 images.

    Args:
        root: The folder with ``images/`` and the CSV files of the split (in it, or in ``split/`` or
            ``splits/``), one line ``filename,label`` an image.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        The collection, sorted by class and file name. A warning tells of copies shrunk to 84 x 84.

    Raises:
        FileNotFoundError: If folder, CSV file or an image is missing.
        ValueError: If ``split`` is none, or the CSV file cannot be read.
    """
    check_split(split)
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {_MINI_SOURCE}")
    places = [root / folder / f"{split}.csv" for folder in (".", "split", "splits")]
    table = next((place for place in places if place.is_file()), None)
    if table is None or not (root / "images").is_dir():
        missing = f"{split}.csv" if table is None else "images"
        raise FileNotFoundError(f"{root}: {missing} not found; {_MINI_SOURCE}")
    rows = sorted(_read_table(table))
    if not rows:
        raise ValueError(f"{table} lists no image; {_MINI_SOURCE}")
    names = sorted({label for label, _ in rows})
    label_of = {name: label for label, name in enumerate(names)}
    collection = ImageCollection(
        name=f"miniImageNet {split}",
        images=tuple(root / "images" / file for _, file in rows),
        labels=np.array([label_of[label] for label, _ in rows]),
        class_names=tuple(names),
        class_numbers=tuple(range(1, len(names) + 1)),
        root=root / "images",
    )
    absent = [file for _, file in rows if not (root / "images" / file).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(rows)} images that {table} lists are not in "
            f"{root / 'images'}: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}"
        )
    warn_if_shrunk(collection)
    return collection


def load_tiered_imagenet(root: str | Path, split: str) -> ImageCollection:
    """Load a split of tieredImageNet: 351, 97 and 160 classes from 20, 6 and 8 super-classes.

    Args:
        root: The folder with ``train/``, ``val/`` and ``test/``, a folder a class inside.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        The collection, sorted by class and file name. A warning tells of copies shrunk to 84 x 84.

    Raises:
        FileNotFoundError: If folder or split is missing, or has no images.
        ValueError: If ``split`` is none.
    """
    collection = split_folder(Path(root), split, f"tieredImageNet {split}", _TIERED_SOURCE)
    warn_if_shrunk(collection)
    return collection


def _read_table(path: Path) -> list[tuple[str, str]]:
    """Label and file name of each line."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"filename", "label"} <= set(reader.fieldnames or []):
            raise ValueError(
                f"{path}: expected the columns filename and label, got {reader.fieldnames}"
            )
        rows = []
        for row in reader:
            if not row["filename"] or not row["label"]:
                raise ValueError(f"{path}, line {reader.line_num}: file name or label missing")
            if Path(row["filename"]).name != row["filename"]:
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected a plain file name, "
                    f"got {row['filename']!r}"
                )
            rows.append((row["label"], row["filename"]))
    return rows
