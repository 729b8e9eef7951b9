"""CIFAR-100, and its few-shot divisions CIFAR-FS and FC100, in each form they are published in.

The ordinary ``cifar-100-python`` folder with the class lists of this package gives both; class
folders and the pickles of the few-shot releases are read as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emd_retrieval.datasets.base import ImageCollection
from emd_retrieval.datasets.fewshot_splits import check_split, class_lists, split_folder
from emd_retrieval.datasets.image_folder import load_image_folder
from emd_retrieval.datasets.plain_pickle import load_plain_pickle

_FOLDER = "cifar-100-python"
_SOURCE = (
    f"expected the folder {_FOLDER} with the files train, test and meta, which is CIFAR-100's "
    'archive "python version", unpacked'
)


def load_cifar100(root: str | Path) -> ImageCollection:
    """Load all 60,000 images of CIFAR-100, 600 a class, training and test part together.

    Images are sorted by class and file name, so that any copy gives the same order.

    Args:
        root: The folder ``cifar-100-python`` or the one it lies in.

    Returns:
        The collection at 32 x 32 pixels, its 100 classes in alphabetical order. ``settings`` names
        each class's super-class under ``super_classes``.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, not CIFAR-100's, or asks for more than plain data.
    """
    root = _cifar_folder(Path(root))
    meta = _read(root / "meta")
    names = [_text(name) for name in _list_of(meta, "fine_label_names", root / "meta")]
    groups = [_text(name) for name in _list_of(meta, "coarse_label_names", root / "meta")]
    pixels, fine, coarse, files = [], [], [], []
    for part in ("train", "test"):
        path = root / part
        batch = _read(path)
        pixels.append(_pixels(batch, path))
        count = len(pixels[-1])
        fine.append(_labels(batch, "fine_labels", count, len(names), path))
        coarse.append(_labels(batch, "coarse_labels", count, len(groups), path))
        files += [f"{part}/{_text(name)}" for name in _list_of(batch, "filenames", path)]
    labels, super_labels = np.concatenate(fine), np.concatenate(coarse)
    if len(files) != len(labels):
        raise ValueError(f"{root}: {len(labels)} images but {len(files)} file names")
    supers = {names[i]: groups[g] for i, g in zip(labels, super_labels, strict=True)}
    by_name = sorted(names)
    labels = np.array([by_name.index(name) for name in names])[labels]
    order = np.lexsort((np.array(files), labels))
    return ImageCollection(
        name="CIFAR-100",
        images=np.concatenate(pixels)[order],
        labels=labels[order],
        class_names=tuple(by_name),
        class_numbers=tuple(range(1, len(names) + 1)),
        settings={"super_classes": supers},
    )


def load_cifar_fs(root: str | Path, split: str) -> ImageCollection:
    """Load a split of CIFAR-FS: 64, 16 and 20 classes of CIFAR-100, 600 images each.

    Args:
        root: ``cifar-100-python`` or the folder it lies in; the official release (``data/`` with
            class folders, its lists under ``splits/bertinetto``); class folders below ``train``,
            ``val``, ``test`` (or ``meta-train`` and so on); or ``CIFAR_FS_train.pickle`` and so on.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        FileNotFoundError: If nothing of these is there; what to fetch is told.
        ValueError: If ``split`` is none, or what is there is damaged.
    """
    return _load_division(Path(root), split, "CIFAR-FS", "cifar_fs", "CIFAR_FS")


def load_fc100(root: str | Path, split: str) -> ImageCollection:
    """Load a split of FC100: 12, 4 and 4 super-classes of CIFAR-100 (60, 20 and 20 classes).

    Args:
        root: ``cifar-100-python`` or the folder it lies in; class folders below ``train``, ``val``,
            ``test`` (or ``meta-train`` and so on); or ``FC100_train.pickle`` and so on.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        FileNotFoundError: If nothing of these is there; what to fetch is told.
        ValueError: If ``split`` is none, or what is there is damaged.
    """
    return _load_division(Path(root), split, "FC100", "fc100", "FC100")


def _load_division(root: Path, split: str, title: str, lists: str, prefix: str) -> ImageCollection:
    check_split(split)
    name = f"{title} {split}"
    names = class_lists(lists)[split]
    if any((root / place / "train").is_file() for place in (".", _FOLDER)):
        whole = load_cifar100(root)
        groups = whole.settings["super_classes"]
        chosen = [c for c in whole.class_names if c in names or groups.get(c) in names]
        return replace(whole.select_classes(chosen), name=name, settings={})
    pickled = root / f"{prefix}_{split}.pickle"
    if pickled.is_file():
        return _from_pickle(pickled, name)
    for folder in (root / "data", root / "cifar100" / "data"):
        if lists == "cifar_fs" and folder.is_dir():
            return replace(load_image_folder(folder, names), name=name)
    return split_folder(root, split, name, f"{_SOURCE}; or a few-shot release of {title}")


def _from_pickle(path: Path, name: str) -> ImageCollection:
    """A few-shot release's pickle: ``data`` ``[n, 32, 32, 3]`` and ``labels``."""
    content = _read(path)
    labels = np.array(_list_of(content, "labels", path))
    images = content.get("data")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{path}: expected images under 'data', uint8 of shape [n, H, W, 3]")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(f"{path}: expected {len(images)} whole numbers under 'labels'")
    found, labels = np.unique(labels, return_inverse=True)
    order = np.argsort(labels, kind="stable")
    return ImageCollection(
        name=name,
        images=images[order],
        labels=labels[order],
        class_names=tuple(str(number) for number in found),
        class_numbers=tuple(int(number) for number in found),
    )


def _cifar_folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; {_SOURCE}")
    folder = path if (path / "train").is_file() else path / _FOLDER
    missing = [name for name in ("train", "test", "meta") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path}: {', '.join(missing)} not found; {_SOURCE}")
    return folder


def _read(path: Path) -> dict[str, Any]:
    content = load_plain_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return {_text(key): value for key, value in content.items()}


def _list_of(content: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = content.get(key)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected a list under {key!r}; it is not CIFAR-100's")
    return value


def _pixels(batch: dict[str, Any], path: Path) -> NDArray[np.uint8]:
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise ValueError(f"{path}: expected uint8 of shape [n, 3072] under 'data'")
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _labels(
    batch: dict[str, Any], key: str, count: int, classes: int, path: Path
) -> NDArray[np.int64]:
    values = np.array(_list_of(batch, key, path))
    if values.dtype.kind not in "iu" or values.shape != (count,):
        raise ValueError(f"{path}: expected {count} whole numbers under {key!r}, one an image")
    if count and not 0 <= values.min() <= values.max() < classes:
        raise ValueError(f"{path}: {key} outside 0 to {classes - 1}, the classes of meta")
    return values.astype(np.int64)


def _text(value: object) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
