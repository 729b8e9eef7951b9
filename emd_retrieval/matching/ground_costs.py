"""Ground costs: what it costs to match one node with another (Equation 2).

A ground cost sees nodes only, so the same function serves paired sets, all pairs and shortlists:
the callers in :mod:`emd_retrieval.matching.matcher` differ only in how they lay the nodes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emd_retrieval._checks import check_choice, check_tensor


def _unit_nodes(nodes: Tensor) -> Tensor:
    return F.normalize(nodes, dim=-1)


def _unit_centered_nodes(nodes: Tensor) -> Tensor:
    return F.normalize(nodes - nodes.mean(dim=-1, keepdim=True), dim=-1)


def _one_minus_dot(query: Tensor, reference: Tensor) -> Tensor:
    # One fused pass: the constant rides along in the GEMM instead of a second walk over the costs.
    one = query.new_ones(())
    if query.ndim == 2:
        return torch.addmm(one, query, reference.mT, alpha=-1)
    if query.ndim == 3 and reference.ndim == 3 and len(query) == len(reference):
        return torch.baddbmm(one, query, reference.mT, alpha=-1)
    return 1 - query @ reference.mT


@dataclass(frozen=True)
class GroundCost:
    """A ground cost in two steps, so that what depends on one image is computed once an image.

    Attributes:
        name: The name under which :func:`ground_cost` finds it.
        prepare: ``[..., N, D] -> [..., N, D]``, on each side alone.
        between: ``[..., N, D], [..., M, D] -> [..., N, M]``, on prepared nodes.
        symmetric: Whether swapping the sides transposes the costs.
    """

    name: str
    prepare: Callable[[Tensor], Tensor]
    between: Callable[[Tensor, Tensor], Tensor]
    symmetric: bool

    def __call__(self, query: Tensor, reference: Tensor) -> Tensor:
        """Cost of every query node against every reference node.

        Args:
            query: Nodes. Shape: ``[..., N, D]``.
            reference: Nodes with the same leading dimensions. Shape: ``[..., M, D]``.

        Returns:
            Costs. Shape: ``[..., N, M]``.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If the channels or leading dimensions differ.
        """
        sizes = check_tensor("query", query, ["...", "N", "D"])
        check_tensor("reference", reference, ["...", "M", "D"], sizes=sizes)
        return self.between(self.prepare(query), self.prepare(reference))


COSINE = GroundCost("cosine", _unit_nodes, _one_minus_dot, symmetric=True)
CENTERED_COSINE = GroundCost(
    "centered_cosine", _unit_centered_nodes, _one_minus_dot, symmetric=True
)

GROUND_COSTS = {cost.name: cost for cost in (COSINE, CENTERED_COSINE)}


def ground_cost(name: str) -> GroundCost:
    """Look a ground cost up by name.

    ``cosine`` is Equation 2, ``1 - cosine``, in [0, 2]. ``centered_cosine`` first subtracts each
    node's mean over its own channels, as the reference code does; it is 1 - Pearson correlation.
    A node of zero norm has cosine 0 with every node.

    Raises:
        ValueError: If there is no such ground cost.

    Example:
        >>> cost = ground_cost("cosine")
        >>> cost(torch.eye(2), torch.tensor([[2.0, 0.0]]))
        tensor([[0.],
                [1.]])
    """
    return GROUND_COSTS[check_choice("ground_cost", name, list(GROUND_COSTS))]
