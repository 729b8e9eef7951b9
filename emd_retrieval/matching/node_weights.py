"""Node weights: how much mass each local feature brings into a match (Equations 11 and 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emd_retrieval._checks import check_choice, check_positive, check_tensor
from emd_retrieval.matching.clusters import METHODS


class _Shares(torch.autograd.Function):
    """Weights over their sum; torch's own backward squares that sum, and tiny ones underflow."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, total: float) -> Tensor:
        # Keeps an all-zero set from dividing zero by zero; it is far below any real weight.
        least = torch.finfo(weights.dtype).tiny * 1e6
        safe = weights.clamp_min(least)
        factor = total / safe.sum(dim=-1, keepdim=True)
        shares: Tensor = safe * factor
        ctx.total = total
        ctx.save_for_backward(shares, factor, weights >= least)
        return shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shares, factor, passes = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, shares).unsqueeze(-1) / ctx.total
        return (grad - along) * factor * passes, None


def normalize_weights(weights: Tensor, total: float = 1.0) -> Tensor:
    """Scale non-negative weights to a common total along the last dimension (Equation 12).

    The paper's total is the number of nodes; similarities divide the mass out, so any total gives
    the same ones. Sets whose weights are all zero come out uniform.

    Shape:
        ``[..., N]`` to ``[..., N]``.
    """
    shares: Tensor = _Shares.apply(weights, total)
    return shares


class WeighedNodes(NamedTuple):
    """Sets with what their weights need of each set alone, computed once a set.

    Attributes:
        nodes: Raw local features. Shape: ``[..., N, D]``.
        mean: Their mean. Shape: ``[..., D]``.
        scale: Root mean square of their norms. Shape: ``[...]``.
        weights: Weights that the sets bring along, clusters' sizes for instance; they sum to one.
            Shape: ``[..., N]``.
    """

    nodes: Tensor
    mean: Tensor
    scale: Tensor
    weights: Tensor | None = None

    @classmethod
    def of(cls, nodes: Tensor, weights: Tensor | None = None) -> WeighedNodes:
        """Measure sets. Shape: ``[..., N, D]``."""
        squares = torch.linalg.vector_norm(nodes, dim=-1).square().mean(dim=-1)
        scale = squares.clamp_min(torch.finfo(nodes.dtype).tiny).sqrt()
        return cls(nodes, nodes.mean(dim=-2), scale, weights)

    def at(self, rows: Tensor | slice) -> WeighedNodes:
        """The sets at some rows."""
        weights = None if self.weights is None else self.weights[rows]
        return WeighedNodes(self.nodes[rows], self.mean[rows], self.scale[rows], weights)


class NodeWeights(Protocol):
    """Both sides' weights, each normalised to a total of one, in a matcher's three layouts."""

    def paired(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """``[..., N, D], [..., M, D] -> [..., N], [..., M]``."""
        ...

    def all_pairs(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """``[Q, N, D], [R, M, D] -> [Q, R, N], [Q, R, M]``."""
        ...

    def shortlist(self, query: WeighedNodes, chosen: WeighedNodes) -> tuple[Tensor, Tensor]:
        """``[Q, N, D], [Q, C, M, D] -> [Q, C, N], [Q, C, M]``."""
        ...


@dataclass(frozen=True)
class CrossReferenceWeights:
    """The paper's cross-reference mechanism (Equation 11): ``relu(u_i . mean_j v_j) + floor``.

    Computed on raw features: neither centred nor normalised, as in the reference code.

    Args:
        floor: Added to every weight, so that no node is lost (reference code: 1e-3; Equation 11
            has none).
        floor_scale: ``"relative"`` measures the floor in units of the two sets' root-mean-square
            node norms, so that scaling the features by any constant changes nothing: PML's testers
            and ``InferenceModel`` L2-normalise packed sets. ``"absolute"`` is the reference code's.
    """

    floor: float = 1e-3
    floor_scale: str = "relative"

    def __post_init__(self) -> None:
        check_positive("floor", self.floor, allow_zero=True)
        check_choice("floor_scale", self.floor_scale, ["relative", "absolute"])

    def paired(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of matching sets. Shape: ``[..., N, D], [..., M, D] -> [..., N], [..., M]``."""
        supply = (query.nodes @ reference.mean.unsqueeze(-1)).squeeze(-1)
        demand = (reference.nodes @ query.mean.unsqueeze(-1)).squeeze(-1)
        return self._weights(supply, demand, query.scale * reference.scale)

    def all_pairs(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of every pair. Shape: ``[Q, N, D], [R, M, D] -> [Q, R, N], [Q, R, M]``."""
        scale = torch.outer(query.scale, reference.scale)
        supply = self._side((query.nodes @ reference.mean.mT).transpose(1, 2), scale)
        if reference is query:
            return supply, supply.transpose(0, 1)
        return supply, self._side((reference.nodes @ query.mean.mT).permute(2, 0, 1), scale)

    def shortlist(self, query: WeighedNodes, chosen: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of each query against its own candidates.

        Shape:
            ``[Q, N, D], [Q, C, M, D]`` to ``[Q, C, N], [Q, C, M]``.
        """
        supply = chosen.mean @ query.nodes.mT
        (q, c, m, d) = chosen.nodes.shape
        demand = chosen.nodes.view(q, c * m, d) @ query.mean.unsqueeze(-1)
        return self._weights(supply, demand.view(q, c, m), query.scale.unsqueeze(1) * chosen.scale)

    def _weights(self, supply: Tensor, demand: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return self._side(supply, scale), self._side(demand, scale)

    def _side(self, relevance: Tensor, scale: Tensor) -> Tensor:
        """Relevance scores to weights; ``scale`` is the product of both sides' scales."""
        floor: Tensor | float = self.floor
        if self.floor_scale == "relative":
            floor = (self.floor * scale).unsqueeze(-1)
        return normalize_weights(relevance.relu() + floor)


@dataclass(frozen=True)
class UniformWeights:
    """Equal weights: every node brings the same mass (Table 2, "Equal")."""

    def paired(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of matching sets. Shape: ``[..., N, D], [..., M, D] -> [..., N], [..., M]``."""
        return _equal(query.nodes.shape[:-1], query), _equal(reference.nodes.shape[:-1], query)

    def all_pairs(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of every pair. Shape: ``[Q, N, D], [R, M, D] -> [Q, R, N], [Q, R, M]``."""
        (q, n, _), (r, m, _) = query.nodes.shape, reference.nodes.shape
        return _equal((q, r, n), query), _equal((q, r, m), query)

    def shortlist(self, query: WeighedNodes, chosen: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of each query against its candidates. Shape: ``[Q, C, N], [Q, C, M]``."""
        (q, n, _), (c, m) = query.nodes.shape, chosen.nodes.shape[1:3]
        return _equal((q, c, n), query), _equal((q, c, m), query)


@dataclass(frozen=True)
class OwnWeights:
    """Weights that the sets bring along (:attr:`WeighedNodes.weights`): the sizes of clusters."""

    def paired(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of matching sets. Shape: ``[..., N, D], [..., M, D] -> [..., N], [..., M]``."""
        return _own(query), _own(reference)

    def all_pairs(self, query: WeighedNodes, reference: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of every pair. Shape: ``[Q, N, D], [R, M, D] -> [Q, R, N], [Q, R, M]``."""
        supply, demand = _own(query), _own(reference)
        return (
            supply.unsqueeze(1).expand(-1, len(demand), -1),
            demand.unsqueeze(0).expand(len(supply), -1, -1),
        )

    def shortlist(self, query: WeighedNodes, chosen: WeighedNodes) -> tuple[Tensor, Tensor]:
        """Weights of each query against its candidates. Shape: ``[Q, C, N], [Q, C, M]``."""
        demand = _own(chosen)
        return _own(query).unsqueeze(1).expand(-1, demand.shape[1], -1), demand


def cross_reference_weights(
    query: Tensor, reference: Tensor, *, floor: float = 1e-3, floor_scale: str = "relative"
) -> tuple[Tensor, Tensor]:
    """Cross-reference weights of paired sets, each side normalised to a total of one.

    Args:
        query: Raw local features. Shape: ``[..., N, D]``.
        reference: Raw local features with the same leading dimensions. Shape: ``[..., M, D]``.
        floor: See :class:`CrossReferenceWeights`.
        floor_scale: See :class:`CrossReferenceWeights`.

    Returns:
        Supply ``[..., N]`` and demand ``[..., M]``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the channels differ, or the floor is negative.

    Example:
        >>> u, v = torch.eye(2), torch.tensor([[3.0, 1.0]])
        >>> cross_reference_weights(u, v, floor=0.0)
        (tensor([0.7500, 0.2500]), tensor([1.]))
    """
    sizes = check_tensor("query", query, ["...", "N", "D"])
    check_tensor("reference", reference, ["...", "M", "D"], sizes=sizes)
    weights = CrossReferenceWeights(floor, floor_scale)
    return weights.paired(WeighedNodes.of(query), WeighedNodes.of(reference))


def node_weights(name: str, *, floor: float = 1e-3, floor_scale: str = "relative") -> NodeWeights:
    """Look node weights up by name.

    ``cross_reference``, ``uniform``, or a method of :func:`cluster_nodes`, whose clusters' sizes
    are the weights.

    Raises:
        ValueError: If there are no such weights, or the floor is negative.
    """
    check_choice("weights", name, ["cross_reference", "uniform", *METHODS])
    if name == "uniform":
        return UniformWeights()
    if name in METHODS:
        return OwnWeights()
    return CrossReferenceWeights(floor, floor_scale)


def _own(sets: WeighedNodes) -> Tensor:
    assert sets.weights is not None  # noqa: S101 (the matcher prepares clusters with their weights)
    return sets.weights


def _equal(shape: Sequence[int], like: WeighedNodes) -> Tensor:
    return like.nodes.new_full(tuple(shape), 1 / shape[-1])
