"""The paper's interior point (Section 4.3): quadratic transportation problems, batched in torch.

Value and optimal flow are differentiable through the KKT conditions (Theorem 1). The linear algebra
behind every Newton step and every implicit gradient is in `newton`, argument checks and leading
dimensions in `problem`, the choice of a solver in `solve`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from emd_retrieval._checks import check_choice, check_positive
from emd_retrieval.transport.newton import NewtonSystem, outer_sum
from emd_retrieval.transport.plan import TransportPlan

Form = Literal["l2", "qp"]

DEFAULT_STRENGTH: dict[str, float] = {"l2": 1e-6, "qp": 1e-4}

# A weight below this share of the total is an empty node: its flow would drown in rounding.
_EMPTY_SHARE = 1e-13
# Targets for the scaled program (cost range 1, mean node weight about 1). Where nodes are alike
# only the curvature tells their flows apart, so the complementarity gap has to go far below it.
_GAP_TARGET = 1e-15
_MARGINAL_TARGET = 1e-12
_DUAL_TARGET = 1e-12
# Newton steps stop short of the boundary by the rest.
_SHARE_OF_STEP = 0.995
# Nearly every problem is done in so many steps. The full second-order correction saves one step in
# six, but makes one problem in some ten thousands zigzag; what is left after these goes without.
_FULL_CORRECTIONS = 20
# Entries of [chunk, N, M] worked on at once: what stays in a CPU's caches, what fills a GPU.
_CHUNK_ENTRIES = {"cpu": 1 << 15}
_CHUNK_ENTRIES_ON_DEVICE = 1 << 24


def solve_qp(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    need_flow: bool = True,
    need_potentials: bool = True,
    form: Form = "l2",
    strength: float | None = None,
    max_iterations: int = 100,
) -> TransportPlan:
    r"""Solve transportation problems as strictly convex quadratic programs (Equations 4 to 10).

    Among the flows ``x >= 0`` that ship every supply and meet every demand, the solution minimises

    - form ``"l2"``: ``cost . x + strength/2 |x|^2``, which tends to the exact plan (Equation 1) as
      the strength goes to 0;
    - form ``"qp"``: ``(cost . x)^2 / 2 + strength/2 |x|^2``, the other form of the authors' code,
      meant for costs that are not negative.

    Value and flow are differentiable once in cost, supply and demand (Theorem 1). A gradient with
    respect to the weights is defined up to a constant that is added to one side and taken from the
    other, because totals must stay equal; it comes centred, like the potentials. For an empty node
    it is the one-sided derivative of giving it mass. Where the support of the flow falls apart
    (equal or integer weights) the flow has no derivative along weights that move mass between the
    parts: the gradient of the value is then a subgradient, that of the flow one finite choice.

    The work is done in float64 on the device of the inputs, whatever their dtype.

    Args:
        cost: Ground costs, of any finite scale and sign.
        supply: Supplier weights, zero or more. Below 1e-13 of the total they count as zero.
        demand: Demander weights, likewise, with the same total.
        need_flow: Return the flow.
        need_potentials: Return the potentials.
        form: Which quadratic program.
        strength: Its curvature, in units of cost per mass for ``"l2"`` (default 1e-6) and of
            squared cost for ``"qp"`` (default 1e-4); the defaults are those of the authors' code.
        max_iterations: Newton steps after which a problem is given up.

    Returns:
        The plan. Its value is ``cost . flow``, without the quadratic term. Its potentials are the
        multipliers of the marginals in units of cost (for ``"qp"`` divided by ``cost . flow``, and
        zero where that is zero). For ``"l2"``, ``cost + strength * flow - u - v >= 0``, with
        equality where there is flow, so they tend to LP duals with the strength. They carry no
        gradient.

    Shape:
        - cost: ``[B, N, M]``, supply: ``[B, N]``, demand: ``[B, M]``, of one float dtype.

    Raises:
        ValueError: If the form is unknown, or strength or max_iterations not positive.
        RuntimeError: If a problem does not converge; the first such problem is named.
    """
    check_choice("form", form, list(DEFAULT_STRENGTH))
    strength = DEFAULT_STRENGTH[form] if strength is None else strength
    check_positive("strength", strength)
    check_positive("max_iterations", max_iterations)
    value, flow, supply_potential, demand_potential = _InteriorPoint.apply(
        cost, supply, demand, form, strength, max_iterations
    )
    return TransportPlan(
        value,
        flow if need_flow else None,
        supply_potential if need_potentials else None,
        demand_potential if need_potentials else None,
    )


def centred(supply_side: Tensor, demand_side: Tensor) -> tuple[Tensor, Tensor]:
    """Move the free constant of a potential across, so that the supply side is zero on average."""
    mean = supply_side.mean(1, keepdim=True)
    return supply_side - mean, demand_side + mean


def refuse_second_derivative(solver: str) -> None:
    """Raise in a backward pass that is itself recorded, which would come out as constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{solver}: the backward pass cannot itself be differentiated (create_graph=True); "
            "the implicit gradient is written for first derivatives"
        )


@dataclass(slots=True)
class _Program:
    """Minimise ``linear . x + (rank_one . x)^2 / 2 + curvature / 2 |x|^2`` over the flows ``x``.

    It is scaled: mean node weights and gradients are about 1.

    Attributes:
        linear: Shape ``[B, N, M]``.
        rank_one: Shape ``[B, N, M]``; ``None`` for zero.
        curvature: Shape ``[B, 1, 1]``.
        supply: Shape ``[B, N]``.
        demand: Shape ``[B, M]``.
        closed: Arcs that touch an empty node. Shape ``[B, N, M]``; ``None`` where there is none.
        arcs: The number of the other arcs. Shape ``[B]``.
    """

    linear: Tensor
    rank_one: Tensor | None
    curvature: Tensor
    supply: Tensor
    demand: Tensor
    closed: Tensor | None
    arcs: Tensor

    def hessian(self, flow: Tensor) -> Tensor:
        """The second derivative, applied to a flow: what it adds to the gradient."""
        product = self.curvature * flow
        if self.rank_one is not None:
            product += self.rank_one * (self.rank_one * flow).sum((1, 2), keepdim=True)
        return product

    def gradient(self, flow: Tensor) -> Tensor:
        return self.hessian(flow).add_(self.linear)

    def fill_closed(self, tensor: Tensor, value: float) -> Tensor:
        """Overwrite, in place, what a tensor says of the closed arcs."""
        return tensor if self.closed is None else tensor.masked_fill_(self.closed, value)


@dataclass(slots=True)
class _Point:
    """Primal and dual variables: slack is what the dual constraints have left.

    On closed arcs the flow is 0 and the slack 1, and neither moves.
    """

    flow: Tensor
    slack: Tensor
    supply_potential: Tensor
    demand_potential: Tensor

    def gap(self, program: _Program) -> Tensor:
        """Mean complementarity product, the ``mu`` of the central path. Shape: ``[B]``."""
        return (self.flow * self.slack).sum((1, 2)) / program.arcs


_Record = TypeVar("_Record", _Program, _Point)


def _take(record: _Record, index: Tensor) -> _Record:
    """Keep some problems of the batch."""
    kept: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        kept[field.name] = None if value is None else value[index]
    return replace(record, **kept)


def _start(program: _Program) -> _Point:
    """The product plan with potentials of the reduction bound, lowered into the interior.

    Both are feasible, so Newton steps only have to close the gap: far fewer of them than from an
    infeasible start where weights differ by orders of magnitude.
    """
    total = program.supply.sum(1)[:, None, None]
    flow = program.supply[:, :, None] * program.demand[:, None, :] / total
    flow = program.fill_closed(flow, 0.0)
    gradient = program.gradient(flow)
    supply_potential = program.fill_closed(gradient.clone(), torch.inf).amin(2, keepdim=True)
    supply_potential = supply_potential.masked_fill(supply_potential == torch.inf, 0.0)
    slack = program.fill_closed(gradient - supply_potential, torch.inf)
    demand_potential = slack.amin(1, keepdim=True)
    demand_potential = demand_potential.masked_fill(demand_potential == torch.inf, 0.0)
    slack = program.fill_closed(slack - demand_potential, 0.0)
    margin = 0.5 * slack.sum((1, 2)) / program.arcs + 1e-3
    slack = program.fill_closed(slack + margin[:, None, None], 1.0)
    return _Point(
        flow, slack, supply_potential[:, :, 0] - margin[:, None], demand_potential[:, 0, :]
    )


def _newton_step(program: _Program, point: _Point, reduced: Tensor, *, cautious: bool) -> None:
    """Move a point by one of Mehrotra's predictor-corrector steps.

    Args:
        program: The program.
        point: Where it stands; updated in place.
        reduced: Gradient less potentials, which is the slack and the dual residual together.
        cautious: Trust the corrector only as far as the predictor could go.
    """
    inverse = program.fill_closed(point.flow.reciprocal(), 0.0)
    ratio = point.slack * inverse
    conductance = program.fill_closed((program.curvature + ratio).reciprocal_(), 0.0)
    system = NewtonSystem(conductance, program.rank_one)
    supply = program.supply - point.flow.sum(2)
    demand = program.demand - point.flow.sum(1)

    def direction(target: Tensor | float, refinements: int) -> tuple[Tensor, ...]:
        # `target` is where the products flow * slack should go, divided by the flow.
        flow, *potentials = system.solve(target - reduced, supply, demand, refinements=refinements)
        slack = program.fill_closed((target - point.slack).addcmul_(ratio, flow, value=-1), 0.0)
        return flow, slack, *potentials

    def longest(flow: Tensor, slack: Tensor, share: float) -> tuple[Tensor, Tensor]:
        # How far flow and slack can each go, at most 1, before one entry has lost that share.
        flow_lost = (flow * inverse).amin((1, 2), keepdim=True)
        slack_lost = (slack / point.slack).amin((1, 2), keepdim=True)
        return -share / flow_lost.clamp(max=-share), -share / slack_lost.clamp(max=-share)

    flow, slack, *_ = direction(0.0, refinements=0)
    primal, dual = longest(flow, slack, 1.0)
    gap = point.gap(program)
    reached = ((point.flow + primal * flow) * (point.slack + dual * slack)).sum((1, 2))
    # Never far below the target: were the gap to vanish first, no arc could carry what is missing.
    centring = (gap * (reached / program.arcs / gap) ** 3).clamp(min=0.1 * _GAP_TARGET)
    second_order = flow * slack
    if cautious:
        second_order *= primal * dual
    target = (centring[:, None, None] - second_order) * inverse

    flow, slack, supply_potential, demand_potential = direction(target, refinements=1)
    primal, dual = longest(flow, slack, _SHARE_OF_STEP)
    # Lengths of their own get further, but what their difference leaves over as a dual residual
    # must stay below the gap, or steps may go in a circle.
    left_over = program.hessian(flow).abs().amax((1, 2), keepdim=True) * (primal - dual).abs()
    shorter = torch.minimum(primal, dual)
    together = left_over > 0.1 * gap[:, None, None]
    primal, dual = torch.where(together, shorter, primal), torch.where(together, shorter, dual)
    point.flow.addcmul_(primal, flow)
    point.slack.addcmul_(dual, slack)
    point.supply_potential.addcmul_(dual[:, :, 0], supply_potential)
    point.demand_potential.addcmul_(dual[:, :, 0], demand_potential)


def _minimise(program: _Program, max_iterations: int, first: int, batch: int) -> _Point:
    """Solve a program by Newton steps; problems leave the batch as they are done.

    Args:
        program: Part of a batch of problems.
        max_iterations: Newton steps at most.
        first: Where in the batch the part begins; for the message.
        batch: Problems in the batch; for the message.

    Raises:
        RuntimeError: If a problem does not converge.
    """
    point = _start(program)
    if not len(point.flow):
        return point
    solution = _Point(*(torch.empty_like(getattr(point, field.name)) for field in fields(point)))
    index = torch.arange(len(point.flow), device=point.flow.device)
    for step in range(max_iterations + 1):
        reduced = program.gradient(point.flow)
        reduced -= outer_sum(point.supply_potential, point.demand_potential)
        gap = point.gap(program)
        marginal = torch.maximum(
            (program.supply - point.flow.sum(2)).abs().amax(1),
            (program.demand - point.flow.sum(1)).abs().amax(1),
        ) / program.supply.sum(1)
        dual = program.fill_closed(reduced - point.slack, 0.0).abs().amax((1, 2))
        # A residual moves the flow by itself over the curvature where nothing else decides it.
        dual_target = (1e-8 * program.curvature[:, 0, 0]).clamp(2e-14, _DUAL_TARGET)
        done = (gap <= _GAP_TARGET) & (marginal <= _MARGINAL_TARGET) & (dual <= dual_target)
        (finished,) = done.nonzero(as_tuple=True)
        if len(finished):
            for field in fields(point):
                state = getattr(point, field.name)
                getattr(solution, field.name)[index[finished]] = state[finished]
            (rest,) = (~done).nonzero(as_tuple=True)
            if not len(rest):
                return solution
            index, program, point = index[rest], _take(program, rest), _take(point, rest)
            reduced, gap, marginal, dual = (x[rest] for x in (reduced, gap, marginal, dual))
        if step < max_iterations:
            _newton_step(program, point, reduced, cautious=step >= _FULL_CORRECTIONS)
    raise RuntimeError(
        f"solve_qp: problem {first + int(index[0])} of {batch} did not converge in "
        f"{max_iterations} Newton steps: scaled complementarity gap {float(gap[0]):.1e} (wanted "
        f"{_GAP_TARGET:.0e}), marginal error {float(marginal[0]):.1e} of the total (wanted "
        f"{_MARGINAL_TARGET:.0e}), dual residual {float(dual[0]):.1e}. Costs or weights that are "
        f"not finite do this, and so may a strength far below the rounding of the costs"
    )


@dataclass(slots=True)
class _Optimum:
    """Solved problems in the user's units, with what the implicit gradient needs.

    Attributes:
        flow: Shape ``[B, N, M]``.
        slack: What the constraint ``flow >= 0`` bears, in units of the gradient; infinite at
            closed arcs. Shape ``[B, N, M]``.
        per_cost: What turns multipliers into units of cost: 1 for form ``"l2"``, 1 over the value
            for ``"qp"``, zero where that is zero. Shape ``[B, 1]``.
        supply_potential: In units of cost, centred. Shape ``[B, N]``.
        demand_potential: Shape ``[B, M]``.
        supply_arc: For each empty supplier the demander it would serve first, else -1.
            Shape ``[B, N]``.
        demand_arc: Likewise. Shape ``[B, M]``.
    """

    flow: Tensor
    slack: Tensor
    per_cost: Tensor
    supply_potential: Tensor
    demand_potential: Tensor
    supply_arc: Tensor
    demand_arc: Tensor


def _follow_arcs(
    matrix: Tensor, rows: Tensor, columns: Tensor, row_arc: Tensor, column_arc: Tensor
) -> tuple[Tensor, Tensor]:
    """Set the potentials of empty nodes so that ``rows + columns = matrix`` on their arcs."""
    served = (matrix - columns[:, None, :]).gather(2, row_arc.clamp(min=0)[:, :, None])[:, :, 0]
    rows = torch.where(row_arc >= 0, served, rows)
    served = (matrix - rows[:, :, None]).gather(1, column_arc.clamp(min=0)[:, None, :])[:, 0, :]
    return rows, torch.where(column_arc >= 0, served, columns)


def _optimum(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    form: str,
    strength: float,
    max_iterations: int,
    first: int,
    batch: int,
) -> _Optimum:
    """Scale a part of the batch, solve it, and put the solution in the user's units."""
    supply, demand = (
        weight.masked_fill(weight <= _EMPTY_SHARE * weight.sum(1, keepdim=True), 0.0)
        for weight in (supply, demand)
    )
    unit = supply.sum(1)[:, None, None] / max(cost.shape[1:])
    supply = supply / unit[:, 0]
    demand = demand * (supply.sum(1) / demand.sum(1))[:, None]
    empty_row, empty_column = supply == 0, demand == 0
    closed = empty_row[:, :, None] | empty_column[:, None, :]
    arcs = (~closed).sum((1, 2)).to(cost.dtype)
    any_closed = bool(closed.any())

    offset = torch.zeros_like(unit)
    rank_one = None
    if form == "l2":
        offset = cost.amin((1, 2), keepdim=True)
        span = torch.maximum(cost.amax((1, 2), keepdim=True) - offset, strength * unit)
        linear = (cost - offset) / span
        curvature, stiffness = strength * unit / span, span / unit
    else:
        span = cost.abs().amax((1, 2), keepdim=True) * math.sqrt(max(cost.shape[1:]))
        span = span.clamp(min=math.sqrt(strength))
        linear, rank_one = torch.zeros_like(cost), cost / span
        curvature, stiffness = strength / span**2, span**2

    program = _Program(
        linear, rank_one, curvature, supply, demand, closed if any_closed else None, arcs
    )
    point = _minimise(program, max_iterations, first, batch)

    rows, columns = point.supply_potential, point.demand_potential
    row_arc = torch.full_like(rows, -1, dtype=torch.long)
    column_arc = torch.full_like(columns, -1, dtype=torch.long)
    if any_closed:
        gradient = program.gradient(point.flow)
        reach = (gradient - columns[:, None, :]).masked_fill(empty_column[:, None, :], torch.inf)
        row_arc = torch.where(empty_row, reach.argmin(2), -1)
        rows, _ = _follow_arcs(gradient, rows, columns, row_arc, column_arc)
        column_arc = torch.where(empty_column, (gradient - rows[:, :, None]).argmin(1), -1)
        rows, columns = _follow_arcs(gradient, rows, columns, row_arc, column_arc)
    flow = point.flow * unit
    scale, per_cost = span[:, 0], torch.ones_like(span[:, 0])
    if rank_one is not None:
        # The gradient of the square is the cost times the value.
        slope = (rank_one * point.flow).sum((1, 2))[:, None]
        slope = torch.where(slope.abs() > 1e-9, slope.reciprocal(), 0.0)
        scale, per_cost = scale * slope, slope / (scale * unit[:, 0])
    rows, columns = centred(rows * scale + offset[:, 0], columns * scale)

    slack = program.fill_closed(stiffness * unit * point.slack, torch.inf)
    return _Optimum(flow, slack, per_cost, rows, columns, row_arc, column_arc)


class _InteriorPoint(torch.autograd.Function):
    """Value and flow of the quadratic program, with Theorem 1's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        supply: Tensor,
        demand: Tensor,
        form: str,
        strength: float,
        max_iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype, batch = cost.dtype, len(cost)
        cost, supply, demand = cost.double(), supply.double(), demand.double()
        entries = _CHUNK_ENTRIES.get(cost.device.type, _CHUNK_ENTRIES_ON_DEVICE)
        size = max(1, entries // cost[0:1].numel()) if batch else 1
        parts = [
            _optimum(
                cost[first : first + size],
                supply[first : first + size],
                demand[first : first + size],
                form=form,
                strength=strength,
                max_iterations=max_iterations,
                first=first,
                batch=batch,
            )
            for first in range(0, max(batch, 1), size)
        ]
        optimum = _Optimum(
            *(torch.cat([getattr(x, field.name) for x in parts]) for field in fields(_Optimum))
        )
        ctx.form, ctx.strength, ctx.dtype = form, strength, dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cost, *(getattr(optimum, field.name) for field in fields(_Optimum)))
        value = (cost * optimum.flow).sum((1, 2))
        potentials = optimum.supply_potential.to(dtype), optimum.demand_potential.to(dtype)
        ctx.mark_non_differentiable(*potentials)
        return value.to(dtype), optimum.flow.to(dtype), *potentials

    @staticmethod
    def backward(
        ctx: Any, grad_value: Tensor | None, grad_flow: Tensor | None, *no_potentials: None
    ) -> tuple[Tensor | None, ...]:
        r"""Solve the KKT system at the optimum once, for the adjoint (Theorem 1, Equation 9).

        With ``g`` the gradient with respect to the flow, the adjoint ``(w, y)`` solves
        ``H w = g + A' y``, ``A w = 0``. Then ``-w`` is the gradient with respect to the linear term
        and ``-y`` that with respect to the marginals. For the value ``g`` is the cost, which by the
        KKT conditions is potentials plus slack less curvature. Potentials only shift ``y``, slack
        sits where no flow moves: what is left to solve for is small, and the dual gradient exact.
        """
        refuse_second_derivative("solve_qp")
        cost, *saved = ctx.saved_tensors
        optimum = _Optimum(*saved)
        potentials = optimum.supply_potential, optimum.demand_potential
        gradient = torch.zeros_like(cost)
        along_value = cost.new_zeros(len(cost), 1)
        if grad_flow is not None:
            gradient += grad_flow
        if grad_value is not None:
            along_value = grad_value.double()[:, None]
            per_cost = optimum.per_cost[:, :, None]
            rest = torch.where(per_cost == 0, cost, -ctx.strength * per_cost * optimum.flow)
            gradient += along_value[:, :, None] * rest

        rank_one = cost if ctx.form == "qp" else None

        def adjoint_of(flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            conductance = flow / (ctx.strength * flow + optimum.slack)
            return NewtonSystem(conductance, rank_one).solve(gradient, 0.0, 0.0, refinements=2)

        adjoint = adjoint_of(optimum.flow)[0]
        # Between parts of a support that fell apart, the potentials would rest on conductances
        # below rounding. For them arcs without flow count as if they had a little, so what ties the
        # parts is the arcs of least slack.
        scale = optimum.slack.masked_fill(optimum.slack == torch.inf, 0.0).amax((1, 2), True)
        rows, columns = adjoint_of(torch.maximum(optimum.flow, 1e-11 * scale / ctx.strength))[1:]
        grad_cost = along_value[:, :, None] * optimum.flow
        if rank_one is None:
            grad_cost -= adjoint
        else:
            along_adjoint = (cost * adjoint).sum((1, 2), keepdim=True)
            grad_cost -= (cost * optimum.flow).sum((1, 2), keepdim=True) * adjoint
            grad_cost -= along_adjoint * optimum.flow
            gradient -= along_adjoint * cost
        rows, columns = _follow_arcs(
            gradient, -rows, -columns, optimum.supply_arc, optimum.demand_arc
        )
        grad_supply, grad_demand = centred(
            rows + along_value * potentials[0], columns + along_value * potentials[1]
        )
        grads = (grad.to(ctx.dtype) for grad in (grad_cost, grad_supply, grad_demand))
        return *grads, None, None, None
