"""``emd``: the value of the optimal plan as a differentiable function of costs and weights.

The exact solvers are wrapped in a torch custom op for compiled graphs and in an autograd function
for eager mode, with one forward and one backward; what torch can differentiate is called as is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emd_retrieval.transport.problem import check_problem
from emd_retrieval.transport.solve import SOLVERS, check_solver, solve_checked


def emd(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    solver: str = "simplex",
    partial: bool = False,
    cpu_round_trip: bool = False,
    check: bool = False,
    **options: Any,
) -> Tensor:
    """Earth Mover's Distance, the optimal value of Equation 1, differentiable in all arguments.

    By the envelope theorem the gradient needs no backward solve: d value / d cost is the flow,
    d value / d supply and d value / d demand are the potentials. A balanced problem fixes these up
    to a constant, added to the one side and taken from the other; they come with the supply side
    zero on average. The constant plays no part in directions that keep the totals equal, so in none
    where the weights are normalised upstream.

    Without gradients to keep (``no_grad``, or no argument that requires one) only the value is
    computed. Under ``solver="opencv"`` the gradient reaches ``cost`` alone, as in the paper's
    reference code: OpenCV returns no potentials. Under ``"sinkhorn"`` and ``"qp"`` value and
    gradient are those of the regularised problem.

    Args:
        cost: See :func:`solve`. Shape: ``[..., N, M]``.
        supply: Shape: ``[..., N]``.
        demand: Shape: ``[..., M]``.
        solver: See :func:`solve`.
        partial: See :func:`solve`.
        cpu_round_trip: See :func:`solve`.
        check: See :func:`solve`.
        **options: See :func:`solve`.

    Returns:
        The least total cost, in units of cost x mass. Shape: ``[...]``.

    Raises:
        TypeError: See :func:`solve`.
        ValueError: See :func:`solve`; also if weights require a gradient under ``solver="opencv"``.
        RuntimeError: If the solver does not reach the optimum; in backward, if a second derivative
            is asked for.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> value = emd(cost, torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]))
        >>> value.backward()
        >>> value.item(), cost.grad
        (0.25, tensor([[0.5000, 0.2500],
                [0.0000, 0.2500]]))
    """
    cost, supply, demand = check_problem(cost, supply, demand)
    check_solver(solver, options)
    if SOLVERS[solver].differentiable:
        solve_here = solve_checked
        if torch.compiler.is_compiling():
            # These loop until they converge, which no graph can hold. Decorating the function where
            # it is defined would load the whole compiler with this module.
            solve_here = torch.compiler.disable(solve_checked)
        plan = solve_here(
            cost,
            supply,
            demand,
            solver=solver,
            partial=partial,
            need_flow=False,
            need_potentials=False,
            cpu_round_trip=cpu_round_trip,
            check=check,
            **options,
        )
        return plan.value
    keep = torch.is_grad_enabled()
    need_flow = keep and cost.requires_grad
    need_potentials = keep and (supply.requires_grad or demand.requires_grad)
    if need_potentials and not SOLVERS[solver].has_potentials:
        raise ValueError(
            f"supply, demand: expected weights that require no gradient, since solver={solver!r} "
            "has no potentials to give them one; detach the weights, "
            "or choose solver='simplex' or 'pot'"
        )
    settings = solver, partial, cpu_round_trip, check, need_flow, need_potentials
    if torch.compiler.is_compiling() or type(cost) is not Tensor:
        compiled: Tensor = _emd_op(cost, supply, demand, *settings)[0]
        return compiled
    if need_flow or need_potentials:
        value: Tensor = _EMD.apply(cost, supply, demand, *settings)
        return value
    return _solve_tensors(cost, supply, demand, *settings)[0]


def _solve_tensors(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    solver: str,
    partial: bool,
    cpu_round_trip: bool,
    check: bool,
    need_flow: bool,
    need_potentials: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, flow and both potentials; a part that is not needed comes without elements."""
    with torch.no_grad():
        plan = solve_checked(
            cost,
            supply,
            demand,
            solver=solver,
            partial=partial,
            need_flow=need_flow,
            need_potentials=need_potentials,
            cpu_round_trip=cpu_round_trip,
            check=check,
        )
    flow, supply_potential, demand_potential = (
        cost.new_empty(0) if part is None else part.contiguous()
        for part in (plan.flow, plan.supply_potential, plan.demand_potential)
    )
    return plan.value, flow, supply_potential, demand_potential


def _plan_gradient(ctx: Any, value_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "emd: the backward pass cannot itself be differentiated (create_graph=True): the value "
            "is piecewise linear, so its second derivatives are zero or do not exist"
        )
    flow, supply_potential, demand_potential = ctx.saved_tensors
    wants_cost, wants_supply, wants_demand, *settings = ctx.needs_input_grad
    if value_grad is None:
        return None, None, None, *(None for _ in settings)
    per_node = value_grad.unsqueeze(-1)
    return (
        per_node.unsqueeze(-1) * flow if wants_cost else None,
        per_node * supply_potential if wants_supply else None,
        per_node * demand_potential if wants_demand else None,
        *(None for _ in settings),
    )


class _EMD(torch.autograd.Function):
    """The gradient in eager mode: what the custom op below does, at a third of its overhead."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        value, *plan = _solve_tensors(*inputs)
        ctx.save_for_backward(*plan)
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _plan_gradient(ctx, *grads)


_emd_op = torch.library.custom_op("emd_retrieval::emd", _solve_tensors, mutates_args=())


@_emd_op.register_fake
def _(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    solver: str,
    partial: bool,
    cpu_round_trip: bool,
    check: bool,
    need_flow: bool,
    need_potentials: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_potentials = need_potentials and SOLVERS[solver].has_potentials
    return (
        cost.new_empty(cost.shape[:-2]),
        cost.new_empty(cost.shape if need_flow else 0),
        cost.new_empty(supply.shape if has_potentials else 0),
        cost.new_empty(demand.shape if has_potentials else 0),
    )


def _keep_plan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    plan = output[1:]
    ctx.mark_non_differentiable(*plan)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*plan)


_emd_op.register_autograd(_plan_gradient, setup_context=_keep_plan)
