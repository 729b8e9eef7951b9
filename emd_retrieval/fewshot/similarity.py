"""The DeepEMD similarity inside episodes: every query set with every support set of its episode.

What a match needs of each image alone is computed once, since images recur over episodes; costs of
many episodes are then one batched GEMM and their problems one call of the solver. Matchers whose
weights or coupling need more than that are asked episode by episode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emd_retrieval.matching import EMDMatcher, PreparedSets, normalize_weights
from emd_retrieval.transport import emd

# A node of no greater norm has no direction, and cosine 0 with every node.
_LEAST_NORM = 1e-12


class Sets(Protocol):
    """Prepared images, with any leading dimensions."""

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions."""
        ...

    @property
    def nodes(self) -> Tensor:
        """Raw local features. Shape: ``[..., N, D]``."""
        ...

    @property
    def image_bytes(self) -> int:
        """Bytes that one image takes when rows are picked."""
        ...

    def at(self, rows: Tensor) -> Self:
        """The images at some rows; ``rows`` of any shape becomes the leading dimensions."""
        ...

    def of_episode(self, places: Tensor | None = None) -> Self:
        """Support sets ``[E, way, shot]`` as ``[E, way * shot]``, or some places of those."""
        ...


@dataclass(frozen=True, slots=True)
class UnitSets:
    """Sets under a cosine cost: ``nodes = norm * unit + offset``, so that only one copy is kept.

    Attributes:
        rows: Nodes as the ground cost wants them, then the mean of the raw nodes: one GEMM gives
            costs and weights. Shape: ``[..., N + 1, D]``.
        norm: What a node was divided by. Shape: ``[..., N]``.
        offset: Mean over channels that was taken off; zero under the plain cosine.
            Shape: ``[..., N]``.
        scale: Root mean square of the raw nodes' norms. Shape: ``[...]``.
    """

    rows: Tensor
    norm: Tensor
    offset: Tensor
    scale: Tensor

    @classmethod
    def of(cls, nodes: Tensor, *, centered: bool) -> UnitSets:
        """Measure sets. Shape: ``[..., N, D]``."""
        return cls(*_Measure.apply(nodes, centered))

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions."""
        return self.scale.shape

    @property
    def nodes(self) -> Tensor:
        """Raw local features. Shape: ``[..., N, D]``."""
        return self.norm.unsqueeze(-1) * self.rows[..., :-1, :] + self.offset.unsqueeze(-1)

    @property
    def image_bytes(self) -> int:
        """Bytes that one image takes when rows are picked."""
        return math.prod(self.rows.shape[-2:]) * self.rows.element_size()

    def at(self, rows: Tensor) -> UnitSets:
        """The sets at some rows; ``rows`` of any shape becomes the leading dimensions."""
        # index_select copies whole images in parallel; fancy indexing of 4-D results does not.
        flat = rows.flatten()
        return UnitSets(*(p.index_select(0, flat).unflatten(0, rows.shape) for p in self._parts))

    def of_episode(self, places: Tensor | None = None) -> UnitSets:
        """Support sets ``[E, way, shot]`` as ``[E, way * shot]``, or some places of those."""
        flat = (p.flatten(1, 2) for p in self._parts)
        return UnitSets(*(p if places is None else p.index_select(1, places) for p in flat))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.rows, self.norm, self.offset, self.scale


class _Measure(torch.autograd.Function):
    """From nodes to the parts of :class:`UnitSets`.

    Written out, since what autograd records of it would walk over the features, the largest tensors
    of an episode, three times as often.
    """

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, centered: bool) -> tuple[Tensor, ...]:
        count, channels = nodes.shape[-2:]
        rows = nodes.new_empty(*nodes.shape[:-2], count + 1, channels)
        unit = rows[..., :-1, :]
        torch.mean(nodes, dim=-2, out=rows[..., -1, :])
        offset = nodes.mean(dim=-1) if centered else nodes.new_zeros(nodes.shape[:-1])
        if centered:
            nodes = nodes - offset.unsqueeze(-1)
        norm = nodes.norm(dim=-1)
        inverse = torch.where(norm > _LEAST_NORM, norm.reciprocal(), 0.0)
        torch.mul(nodes, inverse.unsqueeze(-1), out=unit)
        # The square of a whole node is that of its centred part and of its offset.
        squares = norm.square() + channels * offset.square()
        scale = squares.mean(dim=-1).clamp_min(torch.finfo(norm.dtype).tiny).sqrt()
        ctx.centered = centered
        ctx.save_for_backward(rows, norm, inverse, offset, scale)
        return rows, norm, offset, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        to_rows, to_norm, to_offset, to_scale = grads
        rows, norm, inverse, offset, scale = ctx.saved_tensors
        unit, to_unit = rows[..., :-1, :], to_rows[..., :-1, :]
        count, channels = unit.shape[-2:]
        per_square = (to_scale / (count * scale)).unsqueeze(-1)
        along = (to_unit * unit).sum(dim=-1)
        to_norm = to_norm + per_square * norm - along * inverse
        gradient = to_unit * inverse.unsqueeze(-1)
        gradient.addcmul_(unit, to_norm.unsqueeze(-1))
        if ctx.centered:
            # The offset is a mean over channels, taken off each of them.
            to_offset = to_offset + per_square * channels * offset - gradient.sum(dim=-1)
            gradient += (to_offset / channels).unsqueeze(-1)
        gradient += to_rows[..., -1:, :] / count
        return gradient, None


@dataclass(frozen=True, slots=True)
class MatcherSets:
    """Sets as the matcher itself prepares them, copied only when they are compared.

    Attributes:
        images: Raw local features. Shape: ``[n, N, D]``.
        prepared: The same sets.
        rows: Which of them these are. Shape: ``[...]``.
    """

    images: Tensor
    prepared: PreparedSets
    rows: Tensor

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions."""
        return self.rows.shape

    @property
    def nodes(self) -> Tensor:
        """Raw local features. Shape: ``[..., N, D]``."""
        return self.images[self.rows]

    @property
    def image_bytes(self) -> int:
        """Bytes that one image takes when its sets are compared."""
        return math.prod(self.images.shape[-2:]) * self.images.element_size()

    def at(self, rows: Tensor) -> MatcherSets:
        """The sets at some rows; ``rows`` of any shape becomes the leading dimensions."""
        return replace(self, rows=self.rows[rows])

    def of_episode(self, places: Tensor | None = None) -> MatcherSets:
        """Support sets ``[E, way, shot]`` as ``[E, way * shot]``, or some places of those."""
        flat = self.rows.flatten(1, 2)
        return replace(self, rows=flat if places is None else flat[:, places])


def prepare_sets(matcher: EMDMatcher, nodes: Tensor) -> Sets:
    """Compute once what every episode needs of each image alone.

    Args:
        matcher: The matcher of :func:`episode_similarity`.
        nodes: Local features. Shape: ``[..., N, D]``.
    """
    nodes = nodes.to(torch.promote_types(nodes.dtype, torch.float32))
    if _batches(matcher):
        return UnitSets.of(nodes, centered=matcher.ground_cost == "centered_cosine")
    leading = nodes.shape[:-2]
    images = nodes.reshape(-1, *nodes.shape[-2:])
    rows = torch.arange(len(images), device=nodes.device).view(leading)
    return MatcherSets(images, matcher.prepare(images), rows)


def episode_similarity(matcher: EMDMatcher, query: Sets, support: Sets) -> Tensor:
    """Similarity of every query set with every support set of the same episode.

    The same values as :meth:`EMDMatcher.all_pairs` of each episode.

    Args:
        matcher: What compares two sets.
        query: From :func:`prepare_sets`. Shape: ``[E, Q, N, D]``.
        support: From :func:`prepare_sets` of the same matcher. Shape: ``[E, S, M, D]``.

    Returns:
        Similarities, differentiable in both sides. Shape: ``[E, Q, S]``.
    """
    if isinstance(query, UnitSets) and isinstance(support, UnitSets):
        with torch.autocast(query.rows.device.type, enabled=False):
            return _batched(matcher, query, support)
    if isinstance(query, MatcherSets) and isinstance(support, MatcherSets):
        each = [
            matcher.all_pairs(query.prepared.at(left), support.prepared.at(right))
            for left, right in zip(query.rows, support.rows, strict=True)
        ]
        return torch.stack(each)
    raise TypeError("query, support: expected sets prepared for one matcher")


def _batches(matcher: EMDMatcher) -> bool:
    return (
        matcher.ground_cost in ("cosine", "centered_cosine")
        and matcher.weights in ("cross_reference", "uniform")
        and matcher.coupling == "transport"
    )


def _batched(matcher: EMDMatcher, query: UnitSets, support: UnitSets) -> Tensor:
    (episodes, q, n), (_, s, m) = query.norm.shape, support.norm.shape
    products = query.rows.flatten(1, 2) @ support.rows.flatten(1, 2).mT
    products = products.view(episodes, q, n + 1, s, m + 1).transpose(2, 3)
    cost = 1 - products[..., :-1, :-1]
    if matcher.weights == "uniform":
        supply = cost.new_full((episodes, q, s, n), 1 / n)
        demand = cost.new_full((episodes, q, s, m), 1 / m)
    else:
        with torch.set_grad_enabled(torch.is_grad_enabled() and matcher.weight_gradient):
            supply, demand = _cross_reference(matcher, query, support, products)
    return 1 - emd(cost, supply, demand, solver=matcher.solver)


def _cross_reference(
    matcher: EMDMatcher, query: UnitSets, support: UnitSets, products: Tensor
) -> tuple[Tensor, Tensor]:
    """Equations 11 and 12. Shapes: ``[E, Q, S, N]`` and ``[E, Q, S, M]``."""
    floor: Tensor | float = matcher.weight_floor
    if matcher.weight_floor_scale == "relative":
        scale = query.scale.unsqueeze(2) * support.scale.unsqueeze(1)
        floor = (matcher.weight_floor * scale).unsqueeze(-1)
    supply = products[..., :-1, -1] * query.norm.unsqueeze(2)
    demand = products[..., -1, :-1] * support.norm.unsqueeze(1)
    if matcher.ground_cost == "centered_cosine":
        query_sum = query.rows[..., -1, :].sum(dim=-1)[:, :, None, None]
        support_sum = support.rows[..., -1, :].sum(dim=-1)[:, None, :, None]
        supply = supply + query.offset.unsqueeze(2) * support_sum
        demand = demand + support.offset.unsqueeze(1) * query_sum
    return normalize_weights(supply.relu() + floor), normalize_weights(demand.relu() + floor)
