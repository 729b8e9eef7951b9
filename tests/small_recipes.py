"""Recipes, data and a run that take a second: for the tests of train and table8."""

from pathlib import Path

import pytest
import small_data

BASE = """
data: {name: CUB-200-2011, classes_train: 1-5, classes_test: 6-8}
model:
  backbone: test_resnet
  weights: random
  method: fcn
  pyramid: [2, 1]
  grid: [2]
  patches: 3
  patch_size: 32
  embedding_size: 8
  frozen_trunk: true
views: {resize: 36, crop: 32, cached: 1}
optimization:
  {optimizer: adamw, learning_rate: 0.01, batch_size: 4, images_per_class: 2, steps: 4}
validation: {folds: 2, every: 2}
"""


def write_recipes(folder: Path) -> Path:
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    for loss in ("contrastive", "normalized_softmax"):
        text = f"base: base.yaml\nloss: {{name: {loss}}}\nnotes: small\n"
        (folder / f"{loss}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def cub(tmp_path_factory):
    """Classes 1 to 8 of four pictures each; not to be written to."""
    return small_data.write_cub(tmp_path_factory.mktemp("cub"), range(1, 9), per_class=4)


@pytest.fixture(scope="session")
def trunk_features(tmp_path_factory):
    """The one cache of all runs."""
    return tmp_path_factory.mktemp("trunk")


@pytest.fixture
def recipes(tmp_path):
    return write_recipes(tmp_path / "recipes")
