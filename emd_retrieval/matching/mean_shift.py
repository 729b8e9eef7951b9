"""Mean-shift with a flat kernel, for many small sets at once.

The algorithm is scikit-learn's, step by step. Every mean is a mixture of the set's own nodes, so
that all distances follow from the set's Gram matrix: channels play no part in the loop.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float64]

_MAX_STEPS = 300
_STOP = 1e-3
# Coordinates by which centres of equally many nodes are put in order, as scikit-learn does.
_TIE_KEYS = 8
_BLOCK = 512
# Rounding of a squared distance that is zero, for nodes of unit scale.
_ROUNDING = 1e-13


def mean_shift_labels(sets: _Array, bandwidth: float | None) -> npt.NDArray[np.int64]:
    """The cluster of every node; numbers are without gaps where a cluster has nodes.

    Args:
        sets: Nodes, in units of the root mean square of a set's node norms. Shape: ``[B, N, D]``.
        bandwidth: Radius; ``None`` estimates it for each set.

    Returns:
        Shape: ``[B, N]``.
    """
    blocks = [
        _labels(sets[start : start + _BLOCK], bandwidth) for start in range(0, len(sets), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(sets.shape[:2], dtype=np.int64)


def estimated_bandwidth(squares: _Array) -> _Array:
    """Mean distance to the 0.3 N-th nearest node, as scikit-learn's ``estimate_bandwidth``.

    Where most nodes coincide and that is zero, it is the root mean square distance of two nodes.

    Args:
        squares: Squared distances between the nodes of each set. Shape: ``[B, N, N]``.

    Returns:
        Shape: ``[B]``; zero for a set whose nodes all coincide.
    """
    rank = max(int(0.3 * squares.shape[1]), 1) - 1
    radius = np.sqrt(np.sort(squares, axis=2)[:, :, rank]).mean(axis=1)
    spread = np.sqrt(squares.mean(axis=(1, 2)))
    estimate: _Array = np.where(radius > np.sqrt(_ROUNDING), radius, spread)
    return estimate


def _labels(sets: _Array, bandwidth: float | None) -> npt.NDArray[np.int64]:
    gram = sets @ sets.transpose(0, 2, 1)
    own = np.diagonal(gram, axis1=1, axis2=2)
    between = _clear(own[:, :, None] + own[:, None, :] - 2 * gram)
    if bandwidth is None:
        radius = estimated_bandwidth(between)[:, None]
    else:
        radius = np.full((len(sets), 1), float(bandwidth))
    reach = np.maximum(radius**2, _ROUNDING)

    # Seeds are the nodes; a mean is the average of the nodes within reach of the one before.
    share = np.broadcast_to(np.eye(sets.shape[1]), gram.shape).copy()
    to_nodes = between
    moving = np.ones(share.shape[:2], dtype=bool)
    counts = np.zeros(share.shape[:2])
    for _ in range(_MAX_STEPS + 1):
        within = to_nodes <= reach[:, :, None]
        found = within.sum(axis=2)
        new = np.where(moving[:, :, None], within / np.maximum(found, 1)[:, :, None], share)
        counts = np.where(moving, found, counts)
        step = new - share
        moved = _clear(((step @ gram) * step).sum(axis=2))
        share = new
        moving &= moved > _STOP**2 * reach
        if not moving.any():
            break
        to_nodes = _to_nodes(share, gram, own)

    order = _densest_first(share @ sets[:, :, :_TIE_KEYS], counts)
    share = np.take_along_axis(share, order[:, :, None], axis=1)
    inner = share @ gram @ share.transpose(0, 2, 1)
    norms = np.diagonal(inner, axis1=1, axis2=2)
    apart = _clear(norms[:, :, None] + norms[:, None, :] - 2 * inner)
    kept = np.ones(share.shape[:2], dtype=bool)
    for place in range(share.shape[1] - 1):
        near = apart[:, place, place + 1 :] <= reach
        kept[:, place + 1 :] &= ~(near & kept[:, place, None])
    distances = np.where(kept[:, :, None], _to_nodes(share, gram, own), np.inf)
    labels: npt.NDArray[np.int64] = distances.argmin(axis=1)
    return labels


def _to_nodes(share: _Array, gram: _Array, own: _Array) -> _Array:
    """Squared distances of means to nodes. Shape: ``[B, S, N]`` for shares ``[B, S, N]``."""
    products = share @ gram
    norms = (products * share).sum(axis=2)
    return _clear(norms[:, :, None] + own[:, None, :] - 2 * products)


def _densest_first(centres: _Array, counts: _Array) -> npt.NDArray[np.int64]:
    """Order by count, then by coordinates, the greatest first. Shape: ``[B, S]``."""
    keys = np.concatenate([centres.transpose(2, 0, 1)[::-1], counts[None]])
    order: npt.NDArray[np.int64] = np.lexsort(keys, axis=-1)[:, ::-1]
    return order


def _clear(squares: _Array) -> _Array:
    return np.where(squares > _ROUNDING, squares, 0.0)
