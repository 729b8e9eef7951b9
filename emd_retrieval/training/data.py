"""The data that a recipe names: found, or told how to get."""

from __future__ import annotations

from pathlib import Path

from emd_retrieval.datasets import ImageCollection, load_cub, load_images
from emd_retrieval.training.recipe import DataSettings


def load_recipe_data(
    settings: DataSettings, root: str | Path | None = None
) -> tuple[ImageCollection, ImageCollection]:
    """The training and the test classes of a recipe.

    Args:
        settings: The recipe's ``data``.
        root: The data's folder, in place of the recipe's.

    Returns:
        Collections of disjoint classes.

    Raises:
        FileNotFoundError: If the data are absent; the message says where they come from.
        ValueError: If no folder is given, classes are absent, or a class is in both parts.
    """
    folder = settings.root if root is None else root
    is_cub = "cub" in settings.name.lower()
    if folder is None:
        source = (
            "; CUB-200-2011 comes from the Caltech-UCSD Birds page of the Caltech Vision Lab"
            if is_cub
            else ""
        )
        raise ValueError(
            f"data.root: the recipe names no folder of {settings.name}; give it as data.root, or "
            f"on the command line{source}"
        )
    load = load_cub if is_cub else load_images
    train, test = (load(folder, part) for part in (settings.classes_train, settings.classes_test))
    both = sorted({*train.class_names} & {*test.class_names})
    if both:
        raise ValueError(
            f"data: expected test classes that are not trained on; {len(both)} are in both "
            f"classes_train and classes_test: {', '.join(both[:3])}"
        )
    return train, test
