"""The feature pyramid (Figure 3a): one feature map pooled at several sizes into one set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from emd_retrieval._checks import check_tensor


def check_pyramid(
    sizes: Sequence[int], include_map: bool, *, name: str = "pyramid"
) -> tuple[int, ...]:
    """Return ``sizes`` as a tuple; raise ``ValueError`` if they describe no nodes."""
    levels = tuple(sizes)
    if any(not isinstance(size, int) or size < 1 for size in levels):
        raise ValueError(f"{name}: expected positive whole numbers, got {list(levels)}")
    if not levels and not include_map:
        way_out = "" if name == "grid" else ", or include_map=True"
        raise ValueError(f"{name}: expected at least one level{way_out}, got none")
    return levels


def pyramid_pool(feature_map: Tensor, sizes: Sequence[int], *, include_map: bool = False) -> Tensor:
    """Pool a feature map to each size by adaptive averages and list all cells as nodes.

    Adaptive average pooling stands for the paper's RoI pooling, as in the reference code: a level
    covers the whole map in equal windows, nothing is interpolated, and the 1x1 level is exactly the
    pooled feature. All levels are linear in the map, so they are one matrix product.

    Args:
        feature_map: Shape: ``[B, D, H, W]``.
        sizes: Levels, in the order of the nodes: ``(3, 2, 1)`` gives 9 + 4 + 1 = 14 nodes.
        include_map: Append the cells of the map itself, as the reference code does.

    Returns:
        Nodes, row by row within a level. Shape: ``[B, N, D]``.

    Raises:
        TypeError: If the map is not a floating-point tensor.
        ValueError: If the shape or the sizes do not fit.

    Example:
        >>> pyramid_pool(torch.zeros(2, 64, 7, 7), (3, 2, 1)).shape
        torch.Size([2, 14, 64])
    """
    shape = check_tensor("feature_map", feature_map, ["B", "D", "H", "W"])
    levels = check_pyramid(sizes, include_map, name="sizes")
    cells = feature_map.flatten(2).mT
    if not levels:
        return cells
    pool = _pooling_matrix(shape["H"], shape["W"], levels, include_map)
    return pool.to(cells) @ cells


def pyramid_boxes(sizes: Sequence[int]) -> Tensor:
    """Where each node of :func:`pyramid_pool` lies, as shares of the pooled image.

    Args:
        sizes: Levels, in the order of the nodes.

    Returns:
        Left, top, right, bottom in [0, 1]. Shape: ``[N, 4]``.

    Example:
        >>> pyramid_boxes((2,))[1]
        tensor([0.5000, 0.0000, 1.0000, 0.5000])
    """
    boxes = [
        [column / size, row / size, (column + 1) / size, (row + 1) / size]
        for size in check_pyramid(sizes, include_map=False, name="sizes")
        for row in range(size)
        for column in range(size)
    ]
    return torch.tensor(boxes)


@lru_cache(maxsize=64)
def _pooling_matrix(height: int, width: int, sizes: tuple[int, ...], include_map: bool) -> Tensor:
    """Rows of averaging weights over the ``height * width`` cells. Shape: ``[N, H * W]``."""
    # It is kept between calls: made in inference mode it could not take part in training later.
    with torch.inference_mode(False):
        levels = [
            torch.kron(_pooling_rows(height, size), _pooling_rows(width, size)) for size in sizes
        ]
        if include_map:
            levels.append(torch.eye(height * width))
        return torch.cat(levels)


def _pooling_rows(length: int, bins: int) -> Tensor:
    """Adaptive average pooling of one axis: bin i spans floor(i L/n) to ceil((i+1) L/n)."""
    rows = torch.zeros(bins, length)
    for i in range(bins):
        start, stop = i * length // bins, -(-(i + 1) * length // bins)
        rows[i, start:stop] = 1 / (stop - start)
    return rows
