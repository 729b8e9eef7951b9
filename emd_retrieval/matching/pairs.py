"""All pairs of sets under an exact solver: halves by symmetry, chunks, and the gradient by hand.

The plan is what a gradient needs (envelope theorem), so it can be kept and used in a later call.
Ground costs arrive as two sides of a dot product; how they and the weights came about is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emd_retrieval.transport import solve
from emd_retrieval.transport.solve import native_is_built


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the grid of pairs; of a square on the diagonal, ``upper`` takes one half."""

    rows: slice
    cols: slice
    upper: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    @property
    def count(self) -> int:
        """Its pairs."""
        height, width = self.shape
        return height * (height + 1) // 2 if self.upper else height * width

    def flat(self, device: torch.device) -> Tensor | None:
        """Places of its pairs in the flattened rectangle; ``None`` where it is all of them."""
        if not self.upper:
            return None
        height, width = self.shape
        first, second = torch.triu_indices(height, width, device=device).unbind()
        return first * width + second

    def take(self, grid: Tensor, flat: Tensor | None) -> Tensor:
        """Its pairs of a rectangle. Shape: ``[h, w, ...] -> [count, ...]``."""
        pairs = grid.reshape(-1, *grid.shape[2:])
        return pairs if flat is None else pairs.index_select(0, flat)

    def spread(self, pairs: Tensor, flat: Tensor | None) -> Tensor:
        """The inverse of :meth:`take`, zero elsewhere. Shape: ``[count, ...] -> [h, w, ...]``."""
        height, width = self.shape
        if flat is not None:
            grid = pairs.new_zeros(height * width, *pairs.shape[1:])
            pairs = grid.index_copy_(0, flat, pairs)
        return pairs.view(height, width, *pairs.shape[1:])


def rectangles(queries: int, references: int, pairs: int) -> Iterator[Block]:
    """Cut a grid into blocks of at most ``pairs``, as wide as these allow, row after row."""
    width = min(max(references, 1), pairs)
    height = max(1, pairs // width)
    for top in range(0, queries, height):
        rows = slice(top, min(top + height, queries))
        for left in range(0, references, width):
            yield Block(rows, slice(left, min(left + width, references)), upper=False)


def upper_half(size: int, pairs: int) -> Iterator[Block]:
    """Cut the upper half of a square, its diagonal included, into strips.

    Where the square on the diagonal is a large part of a strip, it is a block of its own, of which
    one half is enough. Elsewhere some pairs below the diagonal come along.
    """
    start = 0
    while start < size:
        height = max(1, min(math.isqrt(pairs), pairs // (size - start)))
        rows = slice(start, min(size, start + height))
        height = rows.stop - start
        if 4 * height > size - start:
            yield Block(rows, rows, upper=True)
            start = rows.stop
        width = max(1, pairs // height)
        for left in range(start, size, width):
            yield Block(rows, slice(left, min(left + width, size)), upper=False)
        start = rows.stop


@dataclass(frozen=True, slots=True)
class PairProblems:
    """The transportation problems of a grid of pairs.

    Attributes:
        weights: Supply ``[h, w, N]`` and demand ``[h, w, M]`` of a block.
        solver: One of :func:`emd_retrieval.transport.solve` that returns potentials.
        symmetric: The sets are compared among themselves, and either order gives one value.
        pairs: Most pairs at once.
        advance: Told the number of pairs that were solved.
    """

    weights: Callable[[Block], tuple[Tensor, Tensor]]
    solver: str
    symmetric: bool
    pairs: int
    advance: Callable[[int], object]

    def blocks(self, queries: int, references: int) -> Iterator[Block]:
        """The blocks that cover the grid, or its upper half where that is enough."""
        if self.symmetric:
            return upper_half(queries, self.pairs)
        return rectangles(queries, references, self.pairs)


class PairPlans:
    """Solutions of all pairs, for use in a later call; see :meth:`EMDMatcher.all_pairs`.

    It holds values, flows and potentials, and no graph.
    """

    def __init__(self) -> None:
        self.similarity: Tensor | None = None
        self.blocks: list[Block] = []
        self.tensors: list[Tensor | None] = []

    @property
    def filled(self) -> bool:
        """Whether a call has left its solutions here."""
        return self.similarity is not None

    def fill(self, solved: PairPlans) -> None:
        """Take the solutions of another."""
        self.similarity, self.blocks = solved.similarity, solved.blocks
        self.tensors = solved.tensors


@torch.no_grad()
def solve_pairs(
    left: Tensor,
    right: Tensor,
    problems: PairProblems,
    *,
    need_flow: bool = False,
    need_potentials: bool = False,
) -> PairPlans:
    """Solve all pairs.

    Args:
        left: The query side of the ground cost, contiguous. Shape: ``[Q, N, E]``.
        right: Its reference side, contiguous. Shape: ``[R, M, E]``.
        problems: Everything else.
        need_flow: Keep the flows.
        need_potentials: Keep the potentials.
    """
    (Q, N, E), (R, M, _) = left.shape, right.shape
    plans = PairPlans()
    similarity = left.new_zeros(Q, R)
    one, grid, problem = left.new_ones(()), _Workspace(left), _Workspace(left)
    for block in problems.blocks(Q, R):
        (height, width), flat = block.shape, block.flat(left.device)
        rows, cols = left[block.rows].view(height * N, E), right[block.cols].view(width * M, E)
        cost = grid.of(height * N, width * M)
        for top in range(0, height, strip := -(-height // 4) if block.upper else height):
            # Of a block that is cut in half along its diagonal, most of the lower half is left out.
            part, start = slice(top * N, (top + strip) * N), top * M if block.upper else 0
            torch.addmm(one, rows[part], cols[start:].mT, alpha=-1, out=cost[part, start:])
        # A solver takes problem after problem, the GEMM leaves row after row.
        costs = problem.of(height, width, N, M)
        costs.copy_(cost.view(height, N, width, M).transpose(1, 2))
        supply, demand = problems.weights(block)
        plan = solve(
            block.take(costs, flat),
            block.take(supply, flat),
            block.take(demand, flat),
            solver=problems.solver,
            need_flow=need_flow,
            need_potentials=need_potentials,
        )
        similarity[block.rows, block.cols] = block.spread(1 - plan.value, flat)
        if need_flow or need_potentials:
            plans.blocks.append(block)
            plans.tensors += [plan.flow, plan.supply_potential, plan.demand_potential]
        problems.advance(block.count)
    if problems.symmetric:
        similarity = similarity.triu()
        similarity += similarity.triu(1).mT
    plans.similarity = similarity
    return plans


def pair_similarities(
    left: Tensor,
    right: Tensor,
    supply: Tensor,
    demand: Tensor,
    problems: PairProblems,
    plans: PairPlans | None = None,
) -> Tensor:
    """``1 - value`` of all pairs, differentiable in all four tensors.

    Args:
        left: See :func:`solve_pairs`. Shape: ``[Q, N, E]``.
        right: Shape: ``[R, M, E]``.
        supply: Shape: ``[Q, R, N]``.
        demand: Shape: ``[Q, R, M]``.
        problems: As for :func:`solve_pairs`, its weights taken from ``supply`` and ``demand``.
        plans: Solutions of these very problems, used in place of solving.

    Returns:
        Shape: ``[Q, R]``.
    """
    similarity: Tensor = _PairSimilarities.apply(left, right, supply, demand, problems, plans)
    return similarity


class _PairSimilarities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        supply: Tensor,
        demand: Tensor,
        problems: PairProblems,
        plans: PairPlans | None,
    ) -> Tensor:
        kept = plans
        if kept is None:
            wants = ctx.needs_input_grad
            need_flow, need_potentials = wants[0] or wants[1], wants[2] or wants[3]
            kept = solve_pairs(
                left, right, problems, need_flow=need_flow, need_potentials=need_potentials
            )
        ctx.blocks, ctx.symmetric = kept.blocks, problems.symmetric
        ctx.weights_shape = supply.shape, demand.shape
        ctx.save_for_backward(left, right, *kept.tensors)
        assert kept.similarity is not None  # noqa: S101 (solved just now, or kept as a whole)
        # Miners edit the matrix in place, so a kept one is never handed out itself.
        return kept.similarity if plans is None else kept.similarity.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "emd: the backward pass cannot itself be differentiated (create_graph=True): the "
                "value is piecewise linear, so its second derivatives are zero or do not exist"
            )
        left, right, *kept = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad = grads[0]
        if ctx.symmetric:
            # Both orders of a pair are one problem; the diagonal counts once.
            grad = grad.triu() + grad.tril(-1).mT
        # Sets compared among themselves are one tensor: its gradient is gathered in one place.
        one_side = ctx.symmetric and left.data_ptr() == right.data_ptr() and wants[0] and wants[1]
        grad_left = left.new_zeros(left.shape) if wants[0] else None
        grad_right = right.new_zeros(right.shape) if wants[1] and not one_side else None
        grad_supply, grad_demand = (
            left.new_zeros(shape) if want else None
            for shape, want in zip(ctx.weights_shape, wants[2:4], strict=True)
        )
        workspace = _Workspace(left)
        for number, block in enumerate(ctx.blocks):
            flow, supply_potential, demand_potential = kept[3 * number : 3 * number + 3]
            rows, cols = block.rows, block.cols
            flat = block.flat(left.device)
            upstream = block.take(grad[rows, cols], flat)
            to_left = None if grad_left is None else grad_left[rows]
            to_right = grad_left if one_side else grad_right
            to_right = None if to_right is None else to_right[cols]
            if flow is not None:
                if left.device.type == "cpu" and native_is_built():
                    from emd_retrieval.transport.simplex import add_flow_products

                    add_flow_products(
                        flow,
                        upstream.contiguous(),
                        left[rows],
                        right[cols],
                        left_gradient=to_left,
                        right_gradient=to_right,
                        upper=block.upper,
                    )
                else:
                    moved = _moved(block, flat, flow, upstream, workspace)
                    for target, share, nodes in (
                        (to_left, moved, right[cols]),
                        (to_right, moved.mT, left[rows]),
                    ):
                        if target is not None:
                            target.view(len(share), -1).addmm_(share, nodes.view(len(share.mT), -1))
            for target, potential in (
                (grad_supply, supply_potential),
                (grad_demand, demand_potential),
            ):
                if target is not None:
                    per_node = -upstream.unsqueeze(-1) * potential
                    target[rows, cols] = block.spread(per_node, flat)
        return grad_left, grad_right, grad_supply, grad_demand, None, None


class _Workspace:
    """Memory that a loop over blocks uses again: fresh pages cost more than the work on them."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def of(self, *shape: int) -> Tensor:
        """An uninitialised tensor; the one handed out before is no longer valid."""
        count = math.prod(shape)
        if self._memory.numel() < count:
            self._memory = self._memory.new_empty(count)
        return self._memory[:count].view(shape)


def _moved(
    block: Block, flat: Tensor | None, flow: Tensor, upstream: Tensor, workspace: _Workspace
) -> Tensor:
    """The flows times the upstream gradient, laid out as the block's GEMM of costs.

    Shape:
        ``[count, N, M]``, ``[count]`` to ``[h * N, w * M]``.
    """
    (height, width), (N, M) = block.shape, flow.shape[1:]
    if flat is not None:
        grid = block.spread(flow * upstream.view(-1, 1, 1), flat)
        return grid.transpose(1, 2).reshape(height * N, width * M)
    moved = workspace.of(height, N, width, M)
    # One pass: the transposition rides along with the product.
    torch.mul(
        flow.view(height, width, N, M).transpose(1, 2),
        upstream.view(height, 1, width, 1),
        out=moved,
    )
    return moved.view(height * N, width * M)
