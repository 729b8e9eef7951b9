"""Evaluation transforms: a decoded RGB image to the normalised tensor that a backbone takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from emd_retrieval.features.backbones import Backbone


def evaluation_transform(
    backbone: Backbone, *, resize: int = 256, crop: int = 224
) -> Callable[[Any], Tensor]:
    """Resize the short side (bicubic), crop the centre, normalise as the backbone was trained.

    Args:
        backbone: Gives mean and standard deviation.
        resize: Short side after resizing, in pixels.
        crop: Side of the square crop, in pixels; at most ``resize``.

    Returns:
        A function of a PIL image. Shape of its result: ``[3, crop, crop]``, float32.

    Raises:
        ValueError: If the crop is larger than the resized image, or a size is not positive.
    """
    if not 0 < crop <= resize:
        raise ValueError(f"crop: expected 1 to resize = {resize} pixels, got {crop}")
    transform: Callable[[Any], Tensor] = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(resize, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(crop),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(backbone.mean, backbone.std),
        ]
    )
    return transform
