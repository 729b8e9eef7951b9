"""Cutting boxes out of images and resizing them, antialiased; on tensors, in batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emd_retrieval._checks import check_positive, check_tensor


def crop_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut boxes out of images and resize each to a square, bicubic with antialiasing.

    A box is cut first, so nothing outside it leaks in; aspect ratios are not kept. Box by box is
    the fast way: torch has vector code for uint8 on a CPU, three to six times as fast as Pillow or
    float32, and matrix products for all boxes at once take twenty times as long or more
    (``benchmarks/extractors.py``).

    Args:
        images: uint8 or floating point, on any device. Shape: ``[B, C, H, W]``.
        boxes: Left, top, right, bottom in whole pixels, right and bottom exclusive. An integer
            dtype. Shape: ``[B, P, 4]``.
        size: Side of the result, in pixels.

    Returns:
        In the dtype of ``images``; uint8 is rounded and clamped, floats may overshoot as bicubic
        interpolation does. Shape: ``[B, P, C, size, size]``.

    Raises:
        TypeError: If ``images`` or ``boxes`` is no tensor, or of another dtype.
        ValueError: If shapes do not fit, or a box is empty or leaves its image.

    Example:
        >>> images = torch.zeros(1, 3, 40, 60, dtype=torch.uint8)
        >>> crop_resize(images, torch.tensor([[[0, 0, 60, 40], [30, 10, 50, 30]]]), 32).shape
        torch.Size([1, 2, 3, 32, 32])
    """
    shape = check_tensor("images", images, ["B", "C", "H", "W"], floating=False)
    sizes = check_tensor("boxes", boxes, ["B", "P", 4], sizes=shape, floating=False)
    check_positive("size", size)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or floating point, got dtype {images.dtype}")
    if boxes.is_floating_point() or boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"boxes: expected whole pixels in an integer dtype, got {boxes.dtype}")
    rows = boxes.cpu()
    _check_inside(rows, shape["H"], shape["W"])
    # CUDA has no uint8 resampling, and on a CPU torch's fails for a result of one pixel.
    exact = images if images.device.type == "cpu" and size > 1 else images.to(_exact_dtype(images))
    patches = exact.new_empty(sizes["B"] * sizes["P"], shape["C"], size, size)
    for place, (left, top, right, bottom) in enumerate(rows.flatten(0, 1).tolist()):
        image = place // sizes["P"]
        patches[place] = F.interpolate(
            exact[image : image + 1, :, top:bottom, left:right],
            size=(size, size),
            mode="bicubic",
            antialias=True,
        )[0]
    if images.dtype == torch.uint8 and patches.dtype != torch.uint8:
        patches = patches.round().clamp(0, 255).to(torch.uint8)
    return patches.view(sizes["B"], sizes["P"], *patches.shape[1:])


def _exact_dtype(images: Tensor) -> torch.dtype:
    return images.dtype if images.is_floating_point() else torch.float32


def _check_inside(boxes: Tensor, height: int, width: int) -> None:
    left, top, right, bottom = boxes.unbind(dim=2)
    inside = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)
    bad = ~(inside & (left < right) & (top < bottom))
    if bool(bad.any()):
        image, place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"boxes: expected left < right and top < bottom inside {width} x {height} pixels; "
            f"box {place} of image {image} is {boxes[image, place].tolist()}"
        )
