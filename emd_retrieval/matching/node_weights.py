"""Node weights: how much mass each local feature brings into a match (Equations 11 and 12)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from emd_retrieval._checks import check_choice, check_positive, check_tensor


def normalize_weights(weights: Tensor, total: float = 1.0) -> Tensor:
    """Scale non-negative weights to a common total along the last dimension (Equation 12).

    The paper's total is the number of nodes; similarities divide the mass out, so any total gives
    the same ones. Sets whose weights are all zero come out uniform.

    Shape:
        ``[..., N]`` to ``[..., N]``.
    """
    # The floor keeps an all-zero set from dividing zero by zero; it is far below any real weight.
    safe = weights.clamp_min(torch.finfo(weights.dtype).tiny * 1e6)
    return safe * (total / safe.sum(dim=-1, keepdim=True))


class NodeWeights(Protocol):
    """Gives both sides' weights, each side normalised to a total of one."""

    def paired(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., N, D], [..., M, D] -> [..., N], [..., M]``."""
        ...

    def all_pairs(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """``[Q, N, D], [R, M, D] -> [Q, R, N], [Q, R, M]``."""
        ...

    def gallery(self, reference: Tensor) -> tuple[Tensor, ...]:
        """What a shortlist needs of the gallery's sets, once for all queries. ``[R, ...]`` each."""
        ...

    def shortlist(
        self, query: Tensor, chosen: Tensor, chosen_gallery: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """``[Q, N, D], [Q, C, M, D] -> [Q, C, N], [Q, C, M]``; gallery facts gathered alike."""
        ...


@dataclass(frozen=True)
class CrossReferenceWeights:
    """The paper's cross-reference mechanism (Equation 11): ``relu(u_i . mean_j v_j) + floor``.

    Computed on raw features: neither centred nor normalised, as in the reference code.

    Args:
        floor: Added to every weight, so that no node is lost (reference code: 1e-3; Equation 11 has
            none).
        floor_scale: ``"relative"`` measures the floor in units of the two sets' root-mean-square
            node norms, so that scaling the features by any constant changes nothing: PML's testers
            and ``InferenceModel`` L2-normalise packed sets. ``"absolute"`` is the reference code's.

    Example:
        >>> weights = CrossReferenceWeights(floor=0.0)
        >>> u, v = torch.eye(2), torch.tensor([[3.0, 1.0]])
        >>> weights.paired(u, v)
        (tensor([0.7500, 0.2500]), tensor([1.]))
    """

    floor: float = 1e-3
    floor_scale: str = "relative"

    def __post_init__(self) -> None:
        check_positive("weight_floor", self.floor, allow_zero=True)
        check_choice("weight_floor_scale", self.floor_scale, ["relative", "absolute"])

    def paired(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of matching sets. Shape: ``[..., N, D], [..., M, D] -> [..., N], [..., M]``."""
        supply = (query @ reference.mean(dim=-2).unsqueeze(-1)).squeeze(-1)
        demand = (reference @ query.mean(dim=-2).unsqueeze(-1)).squeeze(-1)
        return self._weights(supply, demand, _rms_norm(query) * _rms_norm(reference))

    def all_pairs(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of every pair. Shape: ``[Q, N, D], [R, M, D] -> [Q, R, N], [Q, R, M]``."""
        supply = (query @ reference.mean(dim=1).mT).transpose(1, 2)
        demand = torch.einsum("rmd,qd->qrm", reference, query.mean(dim=1))
        return self._weights(supply, demand, torch.outer(_rms_norm(query), _rms_norm(reference)))

    def gallery(self, reference: Tensor) -> tuple[Tensor, ...]:
        """Mean node and scale of each set. Shape: ``[R, M, D] -> [R, D], [R]``."""
        return reference.mean(dim=1), _rms_norm(reference)

    def shortlist(
        self, query: Tensor, chosen: Tensor, chosen_gallery: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Weights of each query against its own candidates.

        Shape:
            ``[Q, N, D], [Q, C, M, D], ([Q, C, D], [Q, C])`` to ``[Q, C, N], [Q, C, M]``.
        """
        means, scales = chosen_gallery
        supply = means @ query.mT
        demand = torch.einsum("qcmd,qd->qcm", chosen, query.mean(dim=1))
        return self._weights(supply, demand, _rms_norm(query).unsqueeze(1) * scales)

    def _weights(self, supply: Tensor, demand: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance scores to weights; ``scale`` is the product of both sides' norms."""
        floor: Tensor | float = self.floor
        if self.floor_scale == "relative":
            floor = (self.floor * scale).unsqueeze(-1)
        return (
            normalize_weights(supply.relu() + floor),
            normalize_weights(demand.relu() + floor),
        )


@dataclass(frozen=True)
class UniformWeights:
    """Equal weights: every node brings the same mass (Table 2, "Equal")."""

    def paired(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of matching sets. Shape: ``[..., N, D], [..., M, D] -> [..., N], [..., M]``."""
        n, m = query.shape[-2], reference.shape[-2]
        return query.new_full(query.shape[:-1], 1 / n), query.new_full(reference.shape[:-1], 1 / m)

    def all_pairs(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of every pair. Shape: ``[Q, N, D], [R, M, D] -> [Q, R, N], [Q, R, M]``."""
        (q, n, _), (r, m, _) = query.shape, reference.shape
        return query.new_full((q, r, n), 1 / n), query.new_full((q, r, m), 1 / m)

    def gallery(self, reference: Tensor) -> tuple[Tensor, ...]:
        """Nothing: equal weights do not look at the sets."""
        return ()

    def shortlist(
        self, query: Tensor, chosen: Tensor, chosen_gallery: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Weights of each query against its candidates. Shape: ``[Q, C, N], [Q, C, M]``."""
        (q, n, _), (c, m) = query.shape, chosen.shape[1:3]
        return query.new_full((q, c, n), 1 / n), query.new_full((q, c, m), 1 / m)


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
    """
    sizes = check_tensor("query", query, ["...", "N", "D"])
    check_tensor("reference", reference, ["...", "M", "D"], sizes=sizes)
    return CrossReferenceWeights(floor, floor_scale).paired(query, reference)


def node_weights(name: str, *, floor: float = 1e-3, floor_scale: str = "relative") -> NodeWeights:
    """Look node weights up by name: ``cross_reference`` or ``uniform``.

    Raises:
        ValueError: If there are no such weights, or the floor is negative.
    """
    check_choice("weights", name, ["cross_reference", "uniform"])
    if name == "uniform":
        return UniformWeights()
    return CrossReferenceWeights(floor, floor_scale)


def _rms_norm(nodes: Tensor) -> Tensor:
    """Root mean square over nodes of the node norms. Shape: ``[..., N, D] -> [...]``."""
    return nodes.square().sum(dim=-1).mean(dim=-1).clamp_min(torch.finfo(nodes.dtype).tiny).sqrt()
