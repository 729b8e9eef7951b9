"""Transforms: a decoded RGB image to the normalised tensor that a backbone takes.

The views of whole images are here, with what the patches of Grid and Sampling share with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as image_functions

from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.crop_resize import crop_resize

Span = tuple[float, float]
Evaluation = Callable[[Any], Tensor]
"""From a PIL image to views: a pure function of the pixels."""
Training = Callable[[Any, torch.Generator], Tensor]
"""From a PIL image to views; the generator decides what is random."""

# As many tries as torchvision's RandomResizedCrop makes before it takes the centre.
_TRIES = 10

# Of an image that is longer than this many times its short side, the middle is looked at: resized
# whole, 30,000 x 1 pixels would take 6 GB.
_LONGEST = 16


def evaluation_transform(backbone: Backbone, *, resize: int = 256, crop: int = 224) -> Evaluation:
    """Resize the short side (bicubic), crop the centre, normalise as the backbone was trained.

    Of an image longer than 16 times its short side only the middle is resized.

    Args:
        backbone: Gives mean and standard deviation.
        resize: Short side after resizing, in pixels.
        crop: Side of the square crop, in pixels; at most ``resize``.

    Returns:
        A function of a PIL image. Shape of its result: ``[3, crop, crop]``, float32.

    Raises:
        ValueError: If the crop is larger than the resized image, or a size is not positive.
    """
    return _Evaluation(_CentreView(resize, crop), Normalisation.of(backbone))


def training_transform(
    backbone: Backbone,
    *,
    resize: int = 256,
    crop: int = 224,
    scale: Span = (0.16, 1.0),
    ratio: Span = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Training:
    """Resize the short side, crop and resize a random box, flip at random, normalise.

    Args:
        backbone: Gives mean and standard deviation.
        resize: Short side after resizing, in pixels.
        crop: Side of the result, in pixels.
        scale: Least and largest area of the box, as shares of the image.
        ratio: Least and largest width over height of the box.
        flip: Mirror every second view, left for right.

    Returns:
        A function of a PIL image and a generator. Shape of its result: ``[3, crop, crop]``.

    Raises:
        ValueError: If a size is not positive, or a range is none.
    """
    for name, side in (("resize", resize), ("crop", crop)):
        if side < 1:
            raise ValueError(f"{name}: expected 1 pixel or more, got {side}")
    check_spans(scale, ratio)
    return _Training(resize, crop, scale, ratio, flip, Normalisation.of(backbone))


def evaluation_view(resize: int = 256, crop: int = 224) -> Callable[[Any], NDArray[np.uint8]]:
    """The part of an image that :func:`evaluation_transform` keeps, as pixels for a picture.

    Returns:
        A function of a PIL image. Shape of its result: ``[crop, crop, 3]``, uint8.
    """
    return _CentreView(resize, crop).picture


@dataclass(frozen=True)
class Normalisation:
    """Pixels to what a backbone was trained on.

    Attributes:
        mean: For RGB in [0, 1].
        std: For RGB in [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, backbone: Backbone) -> Normalisation:
        """The normalisation of a backbone."""
        return cls(backbone.mean, backbone.std)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Shape: ``[..., 3, h, w]`` uint8 to float32."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return pixels.to(torch.float32).sub_(255 * mean).div_(255 * std)


def pixels_of(image: Any) -> Tensor:
    """Pixels of a PIL image, uint8. Shape: ``[3, H, W]``."""
    pixels: Tensor = image_functions.pil_to_tensor(image)
    return pixels


def random_boxes(
    height: int, width: int, count: int, scale: Span, ratio: Span, generator: torch.Generator
) -> Tensor:
    """Boxes of random area, aspect ratio and place: torchvision's RandomResizedCrop, many at once.

    The area is uniform, the aspect ratio log-uniform, the place uniform. Where ten tries find no
    box that fits, it is the largest one in the centre with an allowed aspect ratio.

    Returns:
        Left, top, right, bottom in pixels. Shape: ``[count, 4]``, int64.
    """
    area, aspect, x, y = torch.rand(4, count, _TRIES, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + area * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + aspect * (high - low))
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    found, first = fits.max(dim=1)
    place = first.unsqueeze(1)
    fallback = _centre_box(height, width, ratio)
    w = torch.where(found, widths.gather(1, place)[:, 0], fallback[0])
    h = torch.where(found, heights.gather(1, place)[:, 0], fallback[1])
    left = (x.gather(1, place)[:, 0] * (width - w + 1)).floor()
    top = (y.gather(1, place)[:, 0] * (height - h + 1)).floor()
    left = torch.where(found, left, (width - w).div(2).floor())
    top = torch.where(found, top, (height - h).div(2).floor())
    return torch.stack([left, top, left + w, top + h], dim=1).long()


def random_flips(views: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror every second view at random, left for right. Shape: ``[n, 3, h, w]``, in place."""
    flipped = torch.rand(len(views), generator=generator) < 0.5
    views[flipped] = views[flipped].flip(3)
    return views


def check_crop(resize: int, crop: int) -> None:
    """Raise ``ValueError`` unless the centre crop is a part of the resized image."""
    if not 0 < crop <= resize:
        raise ValueError(f"crop: expected 1 to resize = {resize} pixels, got {crop}")


def check_spans(scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Raise ``ValueError`` unless areas and aspect ratios are ranges that can be drawn from."""
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"scale: expected a range of shares of the image, 0 < least <= largest <= 1, "
            f"got {list(scale)}"
        )
    if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(
            f"ratio: expected a range of width over height, 0 < least <= largest, got {list(ratio)}"
        )


@dataclass(frozen=True)
class _CentreView:
    resize: int
    crop: int

    def __post_init__(self) -> None:
        check_crop(self.resize, self.crop)

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = image_functions.center_crop(
            _resize(pixels_of(image), self.resize), [self.crop, self.crop]
        )
        return pixels

    def picture(self, image: Any) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self(image).permute(1, 2, 0).numpy()
        return pixels


@dataclass(frozen=True)
class _Evaluation:
    view: _CentreView
    normalise: Normalisation

    def __call__(self, image: Any) -> Tensor:
        return self.normalise(self.view(image))


@dataclass(frozen=True)
class _Training:
    resize: int
    crop: int
    scale: Span
    ratio: Span
    flip: bool
    normalise: Normalisation

    def __call__(self, image: Any, generator: torch.Generator) -> Tensor:
        pixels = _resize(pixels_of(image), self.resize)
        boxes = random_boxes(pixels.shape[1], pixels.shape[2], 1, self.scale, self.ratio, generator)
        views = crop_resize(pixels.unsqueeze(0), boxes.unsqueeze(0), self.crop)[0]
        if self.flip:
            views = random_flips(views, generator)
        return self.normalise(views)[0]


def _resize(pixels: Tensor, short_side: int) -> Tensor:
    height, width = pixels.shape[-2:]
    longest = _LONGEST * min(height, width)
    if max(height, width) > longest:
        pixels = image_functions.center_crop(pixels, [min(height, longest), min(width, longest)])
    resized: Tensor = image_functions.resize(
        pixels, [short_side], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return resized


def _centre_box(height: int, width: int, ratio: Span) -> tuple[float, float]:
    """Width and height of the largest box with an allowed aspect ratio, in whole pixels."""
    if width / height < ratio[0]:
        return float(width), float(max(1, min(height, round(width / ratio[0]))))
    if width / height > ratio[1]:
        return float(max(1, min(width, round(height * ratio[1])))), float(height)
    return float(width), float(height)
