"""Small inputs as users bring them: a folder of class folders, and a weights file.

A conftest.py that imports the fixtures offers them to its folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

BACKBONE = "test_resnet"
CLASSES = ("robin", "wren", "tit")


def write_images(folder: Path, per_class: int = 4, classes: tuple[str, ...] = CLASSES) -> Path:
    """A picture is stripes of its class's direction and colour, with noise of its own."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:48, :56] / 48
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            phase = generator.uniform(0, 2 * np.pi)
            angle = np.pi * number / len(classes)
            stripes = np.sin(18 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
            colour = np.roll([120, 60, 20], number)
            pixels = 110 + stripes[..., None] * colour + generator.normal(0, 25, (48, 56, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{i:02d}.png")
    return folder


def write_weights(file: Path, seed: int = 0) -> Path:
    """Random weights of :data:`BACKBONE`, classifier included."""
    torch.manual_seed(seed)
    model = timm.create_model(BACKBONE, pretrained=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return file


def write_cub(folder: Path, classes: Iterable[int], per_class: int = 2, side: int = 40) -> Path:
    """The layout of CUB-200-2011 with some of its class numbers, each a colour with noise."""
    generator = np.random.default_rng(0)
    root = folder / "CUB_200_2011"
    lines: dict[str, list[str]] = {"classes": [], "images": [], "image_class_labels": []}
    for number in classes:
        name = f"{number:03d}.Bird_{number}"
        lines["classes"].append(f"{number} {name}")
        (root / "images" / name).mkdir(parents=True)
        colour = generator.uniform(40, 215, 3)
        for i in range(per_class):
            image = len(lines["images"]) + 1
            lines["images"].append(f"{image} {name}/{i}.png")
            lines["image_class_labels"].append(f"{image} {number}")
            pixels = (colour + generator.normal(0, 20, (side, side, 3))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name / f"{i}.png")
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four pictures; not to be written to."""
    return write_images(tmp_path_factory.mktemp("data") / "birds")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "net.safetensors")
