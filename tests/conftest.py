"""Fixtures for all tests: seeded randomness, and real data only where the environment names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

DATA_VARIABLE = "EMD_RETRIEVAL_DATA"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260101)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with real data and weights; tests that need it carry the marker ``data``."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"real data: ${DATA_VARIABLE} is not set")
    root = Path(folder).resolve()
    if not root.is_dir():
        pytest.fail(f"${DATA_VARIABLE} is set to {folder}, which is not a folder")
    return root


@pytest.fixture(scope="session")
def cub_root(data_root: Path) -> Path:
    folder = data_root / "data" / "CUB_200_2011"
    if not folder.is_dir():
        pytest.skip(f"real data: no data/CUB_200_2011 under ${DATA_VARIABLE}")
    return folder


@pytest.fixture(scope="session")
def lite0_weights(data_root: Path) -> Path:
    file = data_root / "weights" / "tf_efficientnet_lite0.safetensors"
    if not file.is_file():
        pytest.skip(f"real data: no weights/{file.name} under ${DATA_VARIABLE}")
    return file
