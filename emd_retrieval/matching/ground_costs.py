"""Ground costs: what it costs to match one node with another (Equation 2).

A ground cost sees nodes only, so the same function serves paired sets, all pairs and shortlists:
the callers in :mod:`emd_retrieval.matching.matcher` differ only in how they lay the nodes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emd_retrieval._checks import check_choice, check_tensor


def least_norm(dtype: torch.dtype) -> float:
    """Norms up to this count as zero: the squares behind them have lost digits to underflow.

    3.1e-16 in float32 (and below, where norms are computed in float32), 1e-146 in float64.
    """
    finfo = torch.finfo(torch.promote_types(dtype, torch.float32))
    return math.sqrt(finfo.smallest_normal / finfo.eps)


class _Unit(torch.autograd.Function):
    """Division by the norm; torch's own backward walks over the nodes twice as often."""

    @staticmethod
    def forward(ctx: Any, nodes: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(nodes, dim=-1, keepdim=True)
        # A zero node stays zero and gets no gradient; an overflowing norm must not pass as one.
        inverse = torch.where(norm > least_norm(nodes.dtype), norm.reciprocal(), 0) + 0 * norm
        unit: Tensor = nodes * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1)
        across: Tensor = torch.addcmul(grad, unit, along, value=-1)
        return across.mul_(inverse)


def _unit_nodes(nodes: Tensor) -> Tensor:
    unit: Tensor = _Unit.apply(nodes)
    return unit


def _unit_centered_nodes(nodes: Tensor) -> Tensor:
    return _unit_nodes(nodes - nodes.mean(dim=-1, keepdim=True))


def _centered_unit_nodes_and_power(nodes: Tensor) -> Tensor:
    unit = _unit_nodes(nodes)
    centered = unit - unit.mean(dim=-1, keepdim=True)
    return torch.cat([centered, centered.square().sum(dim=-1, keepdim=True)], dim=-1)


def _signal(prepared: Tensor) -> Tensor:
    # |q - r|^2 / |q|^2 = 1 - <(2 q, -1) / |q|^2, (r, |r|^2)>. A node without variance has no signal
    # to measure noise by: its row stays zero, so its cost is 1 with every node.
    nodes, power = prepared[..., :-1], prepared[..., -1:]
    has_signal = power > torch.finfo(power.dtype).eps
    inverse = torch.where(has_signal, power, torch.inf).reciprocal()
    return torch.cat([2 * nodes * inverse, -inverse], dim=-1)


def _as_prepared(prepared: Tensor) -> Tensor:
    return prepared


@dataclass(frozen=True)
class GroundCost:
    """A ground cost as ``1 - <query side, reference side>``: what is of one image, then a GEMM.

    Attributes:
        name: The name under which :func:`ground_cost` finds it.
        prepare: ``[..., N, D] -> [..., N, E]``, on each side alone, once an image.
        query_side: ``[..., N, E] -> [..., N, E]``, on a prepared query; no more than a few passes.
        symmetric: Whether swapping the sides transposes the costs.
    """

    name: str
    prepare: Callable[[Tensor], Tensor]
    query_side: Callable[[Tensor], Tensor]
    symmetric: bool

    def between(self, query: Tensor, reference: Tensor) -> Tensor:
        """``[..., N, E], [..., M, E] -> [..., N, M]``, on prepared nodes."""
        return _one_minus_dot(self.query_side(query), reference)

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


def _one_minus_dot(query: Tensor, reference: Tensor) -> Tensor:
    """``1 - query @ reference^T``. Shape: ``[..., N, E], [..., M, E] -> [..., N, M]``."""
    # One fused pass: the constant rides along in the GEMM instead of a second walk over the costs.
    one = query.new_ones(())
    if query.ndim == 2:
        return torch.addmm(one, query, reference.mT, alpha=-1)
    if query.ndim == 3 and reference.ndim == 3 and len(query) == len(reference):
        return torch.baddbmm(one, query, reference.mT, alpha=-1)
    return 1 - query @ reference.mT


COSINE = GroundCost("cosine", _unit_nodes, _as_prepared, symmetric=True)
CENTERED_COSINE = GroundCost("centered_cosine", _unit_centered_nodes, _as_prepared, symmetric=True)
SNR = GroundCost("snr", _centered_unit_nodes_and_power, _signal, symmetric=False)

GROUND_COSTS = {cost.name: cost for cost in (COSINE, CENTERED_COSINE, SNR)}


def ground_cost(name: str) -> GroundCost:
    """Look a ground cost up by name.

    ``cosine`` is Equation 2, ``1 - cosine``, in [0, 2]. ``centered_cosine`` first subtracts each
    node's mean over its own channels, as the reference code does; it is 1 - Pearson correlation.
    A node of zero norm (in float32: up to 3.1e-16) has cosine 0 with every node. ``snr`` is the
    signal-to-noise distance ``var(q - r) / var(q)`` of nodes of unit norm (:class:`SNRDistance` of
    pytorch-metric-learning, node by node): zero or more, unbounded and not symmetric; a query node
    whose channels are all equal has no signal and costs 1 with every node.

    Raises:
        ValueError: If there is no such ground cost.

    Example:
        >>> cost = ground_cost("cosine")
        >>> cost(torch.eye(2), torch.tensor([[2.0, 0.0]]))
        tensor([[0.],
                [1.]])
    """
    return GROUND_COSTS[check_choice("ground_cost", name, list(GROUND_COSTS))]
