"""Evaluation transforms: a decoded RGB image to the normalised tensor that a backbone takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    transform: Callable[[Any], Tensor] = v2.Compose(
        [
            *_resize_and_crop(resize, crop),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(backbone.mean, backbone.std),
        ]
    )
    return transform


def evaluation_view(resize: int = 256, crop: int = 224) -> Callable[[Any], NDArray[np.uint8]]:
    """The part of an image that :func:`evaluation_transform` keeps, as pixels for a picture.

    Returns:
        A function of a PIL image. Shape of its result: ``[crop, crop, 3]``, uint8.
    """
    cut = v2.Compose(_resize_and_crop(resize, crop))

    def view(image: Any) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = cut(image).permute(1, 2, 0).numpy()
        return pixels

    return view


def _resize_and_crop(resize: int, crop: int) -> list[Any]:
    if not 0 < crop <= resize:
        raise ValueError(f"crop: expected 1 to resize = {resize} pixels, got {crop}")
    return [
        v2.PILToTensor(),
        v2.Resize(resize, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.CenterCrop(crop),
    ]
