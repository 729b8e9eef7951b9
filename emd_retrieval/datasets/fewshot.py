"""The five few-shot data sets and any tree of class folders, by name and split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from emd_retrieval._checks import check_choice
from emd_retrieval.datasets.base import ImageCollection
from emd_retrieval.datasets.cifar import load_cifar_fs, load_fc100
from emd_retrieval.datasets.cub import load_cub
from emd_retrieval.datasets.fewshot_splits import check_split, class_lists, split_folder
from emd_retrieval.datasets.imagenet_fewshot import load_mini_imagenet, load_tiered_imagenet


def load_cub_fewshot(root: str | Path, split: str) -> ImageCollection:
    """Load a split of CUB's few-shot division: 100, 50 and 50 species, by name.

    Of a copy that holds only some of the species, those that are there are taken.

    Args:
        root: The folder ``CUB_200_2011`` or the one it lies in.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        FileNotFoundError: See :func:`load_cub`; also if no species of the split is there.
        ValueError: If ``split`` is none, or the index files cannot be read.
    """
    check_split(split)
    birds = load_cub(root)
    wanted = class_lists("cub")[split]
    here = [name for name in birds.class_names if name in wanted]
    if not here:
        raise FileNotFoundError(
            f"{root}: none of the {len(wanted)} species of the split {split!r} is in its "
            f"classes.txt (they are {wanted[0]}, {wanted[1]}, ...); fetch the whole CUB-200-2011"
        )
    return replace(birds.select_classes(here), name=f"CUB few-shot {split}")


def load_split_folders(root: str | Path, split: str) -> ImageCollection:
    """Load a split of any data set that lies as class folders below train, val and test.

    Args:
        root: The folder with ``train/``, ``val/``, ``test/`` (or ``meta-train/`` and so on).
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        FileNotFoundError: If folder or split is missing, or has no images.
        ValueError: If ``split`` is none.
    """
    source = "expected folders train, val and test with one folder a class inside"
    return split_folder(Path(root), split, f"{Path(root).resolve().name} {split}", source)


FEWSHOT_DATASETS: dict[str, Callable[[str | Path, str], ImageCollection]] = {
    "mini_imagenet": load_mini_imagenet,
    "tiered_imagenet": load_tiered_imagenet,
    "cifar_fs": load_cifar_fs,
    "fc100": load_fc100,
    "cub": load_cub_fewshot,
    "folder": load_split_folders,
}


def load_fewshot(name: str, root: str | Path, split: str) -> ImageCollection:
    """Load a split of a few-shot data set.

    Args:
        name: ``"mini_imagenet"``, ``"tiered_imagenet"``, ``"cifar_fs"``, ``"fc100"``, ``"cub"``, or
            ``"folder"`` for any tree of class folders.
        root: Where it lies.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        FileNotFoundError: If it is not there; what to fetch is told.
        ValueError: If there is no such data set or split, or its files are damaged.
    """
    return FEWSHOT_DATASETS[check_choice("name", name, list(FEWSHOT_DATASETS))](root, split)
