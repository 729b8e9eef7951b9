"""A small recipe on drawn birds, from which each test changes what it needs."""

from __future__ import annotations

import copy
from functools import cache

from emd_retrieval.datasets import ImageCollection, demo_birds
from emd_retrieval.training import Recipe, recipe_from_dict

_BASE = {
    "model": {
        "backbone": "test_resnet",
        "weights": "random",
        "embedding_size": 16,
        "pyramid": [2, 1],
        "patches": 3,
        "patch_size": 32,
        "frozen_trunk": True,
    },
    "views": {"resize": 48, "crop": 40, "cached": 2},
    "loss": {"name": "multi_similarity", "parameters": {"beta": 20}},
    "optimization": {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "batch_size": 8,
        "images_per_class": 2,
        "steps": 12,
        "warmup_steps": 2,
        "schedule": "cosine",
    },
    "validation": {"folds": 4, "every": 4},
}


def small_recipe(**changes) -> Recipe:
    """``small_recipe(model__method="raw", seed=1)``."""
    content = copy.deepcopy(_BASE)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            content.setdefault(section, {})[name] = value
        else:
            content[section] = value
    return recipe_from_dict(content)


@cache
def small_birds() -> ImageCollection:
    """Eight species of six images."""
    return demo_birds(8, 6, size=48)
