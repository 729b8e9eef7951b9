"""Sets of fewer nodes: the clusters of a set's local features, their means and their sizes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emd_retrieval._checks import check_choice, check_positive, check_tensor
from emd_retrieval.matching.mean_shift import mean_shift_labels

METHODS = ("k_means", "mean_shift")
"""How :func:`cluster_nodes` finds clusters."""

_Rows = npt.NDArray[np.float64]
_Labels = npt.NDArray[np.int64]


class ClusteredNodes(NamedTuple):
    """Sets as the clusters of their nodes; see :func:`cluster_nodes`.

    Attributes:
        nodes: Means of the clusters, the largest first, then zeros. Shape: ``[B, K, D]``.
        weights: Shares of the set's nodes, then zeros. Shape: ``[B, K]``.
        counts: How many clusters a set has. Shape: ``[B]``.
    """

    nodes: Tensor
    weights: Tensor
    counts: Tensor


def cluster_nodes(
    sets: Tensor,
    method: str,
    *,
    clusters: int = 8,
    bandwidth: float | None = None,
    seed: int = 0,
) -> ClusteredNodes:
    """Cluster the nodes of each set as scikit-learn does, in float64.

    The assignment is a constant, the means are differentiable in the sets. Scaling a set scales its
    means and changes nothing else.

    Args:
        sets: Shape: ``[B, N, D]``.
        method: ``"k_means"``, or ``"mean_shift"``, which finds the number of clusters itself.
        clusters: K, the budget: ``k_means`` makes as many clusters (fewer where a set has fewer
            distinct nodes); of ``mean_shift`` the K largest stay, and take in the nodes of the
            others.
        bandwidth: Radius of ``mean_shift``, in units of the root mean square of the set's node
            norms; ``None`` estimates it for each set.
        seed: Of ``k_means``' starts.

    Returns:
        Means, weights and counts; the rest of the budget are zero nodes of zero weight.

    Raises:
        TypeError: If ``sets`` is not a floating-point tensor.
        ValueError: If it is not 3-D, not finite or without nodes, the method is unknown, or a
            number is out of range.

    Example:
        >>> sets = torch.tensor([[[0.0, 1.0], [0.0, 1.2], [5.0, 0.0]]])
        >>> means, weights, counts = cluster_nodes(sets, "k_means", clusters=3)
        >>> cluster_nodes(sets, "k_means", clusters=2).nodes
        tensor([[[0.0000, 1.1000],
                 [5.0000, 0.0000]]])
    """
    check_tensor("sets", sets, ["B", "N", "D"], finite=True)
    check_choice("method", method, METHODS)
    check_cluster_settings(clusters, bandwidth)
    if 0 in sets.shape[1:]:
        raise ValueError(f"sets: expected at least one node and channel, got {list(sets.shape)}")
    (B, N, _), budget = sets.shape, int(clusters)
    share = np.zeros((B, budget, N))
    features = sets.detach().double().cpu().numpy()
    if method == "k_means":
        found = [_k_means(rows, budget, seed) for rows in features]
    else:
        found = list(_mean_shift(features, budget, bandwidth)) if B else []
    for place, labels in enumerate(found):
        share[place, labels, np.arange(N)] = 1
    sizes = share.sum(axis=2)
    averages = share / np.maximum(sizes, 1)[..., None]
    return ClusteredNodes(
        nodes=torch.from_numpy(averages).to(sets) @ sets,
        weights=torch.from_numpy(sizes / N).to(sets),
        counts=torch.from_numpy((sizes > 0).sum(axis=1)).to(sets.device),
    )


def check_cluster_settings(clusters: int, bandwidth: float | None) -> None:
    """Raise unless the budget is a positive integer and the bandwidth positive or automatic."""
    check_positive("clusters", clusters)
    if int(clusters) != clusters:
        raise ValueError(f"clusters: expected an integer, got {clusters!r}")
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)


def _k_means(rows: _Rows, budget: int, seed: int) -> _Labels:
    from sklearn.cluster import KMeans

    if budget == 1:
        return np.zeros(len(rows), dtype=np.int64)
    _, distinct = np.unique(rows, axis=0, return_inverse=True)
    if budget > distinct.max():  # every distinct node is a cluster
        return _largest_first(distinct.ravel())
    found = KMeans(n_clusters=budget, n_init=3, random_state=seed).fit_predict(_unit_scale(rows))
    return _largest_first(found)


def _mean_shift(sets: _Rows, budget: int, bandwidth: float | None) -> _Labels:
    """Shape: ``[B, N, D]`` to ``[B, N]``."""
    sets = np.stack([_unit_scale(rows) for rows in sets])
    every = np.stack([_largest_first(row) for row in mean_shift_labels(sets, bandwidth)])
    for place in np.flatnonzero(every.max(axis=1) >= budget):
        rows, labels = sets[place], every[place]
        over = labels >= budget
        means = np.stack([rows[labels == label].mean(axis=0) for label in range(budget)])
        gaps = np.linalg.norm(rows[over, None] - means[None], axis=2)
        labels[over] = gaps.argmin(axis=1)
        every[place] = _largest_first(labels)
    return every


def _unit_scale(rows: _Rows) -> _Rows:
    scale = float(np.sqrt((rows**2).sum(axis=1).mean()))
    return rows / scale if scale > 0 else rows


def _largest_first(labels: _Labels) -> _Labels:
    """The same clusters, numbered by size, then by first member: no order of a library's own."""
    _, first, inverse, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort((first, -sizes))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    renumbered: _Labels = number[inverse]
    return renumbered
