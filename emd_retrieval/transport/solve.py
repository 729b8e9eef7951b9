"""``solve``: one call for every transport solver, and the table of what each of them can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from emd_retrieval._checks import check_choice
from emd_retrieval.transport.plan import TransportPlan
from emd_retrieval.transport.problem import (
    InvalidProblemError,
    check_problem,
    check_values,
    empty_plan,
    flatten_problem,
    pad_lighter_side,
    unflatten_plan,
    unpad_plan,
)

SIMPLEX_NODES = 64
"""Most nodes a side that the package's simplex takes; :func:`solve` hands larger ones to POT."""

_PACKAGE = "emd_retrieval.transport"


@dataclass(frozen=True, slots=True)
class Solver:
    """What the interface needs to know about a solver.

    Attributes:
        path: Module and function, imported on first use.
        requires: The module without which it does not run.
        devices: Device types it runs on; empty for every one.
        differentiable: Plain autograd runs through it; the others get their gradient from the plan.
        checks_values: It raises :class:`InvalidProblemError` and balances the totals itself.
        has_potentials: It returns potentials.
    """

    path: str
    requires: str
    devices: tuple[str, ...] = ()
    differentiable: bool = False
    checks_values: bool = False
    has_potentials: bool = True


SOLVERS = {
    "simplex": Solver(
        "simplex:solve_simplex", f"{_PACKAGE}._native", ("cpu", "cuda"), checks_values=True
    ),
    "pot": Solver("pot:solve_pot", "ot", ("cpu",)),
    "opencv": Solver("opencv:solve_opencv", "cv2", ("cpu",), has_potentials=False),
    "sinkhorn": Solver("sinkhorn:solve_sinkhorn", f"{_PACKAGE}.sinkhorn", differentiable=True),
    "qp": Solver("qp:solve_qp", f"{_PACKAGE}.qp", differentiable=True),
}
_CUDA_SIMPLEX = Solver("cuda:solve_simplex_cuda", "cuda", ("cuda",), checks_values=True)


def available_solvers() -> tuple[str, ...]:
    """Names of the solvers that run in this installation.

    Example:
        >>> "simplex" in available_solvers()
        True
    """
    return tuple(name for name in SOLVERS if _is_installed(name))


def _is_installed(name: str) -> bool:
    if find_spec(SOLVERS[name].requires):
        return True
    # On CUDA the simplex needs no native module.
    on_cuda = name == "simplex" and torch.cuda.is_available()
    return on_cuda and find_spec(_CUDA_SIMPLEX.requires) is not None


def solve(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    solver: str = "simplex",
    partial: bool = False,
    need_flow: bool = True,
    need_potentials: bool = True,
    cpu_round_trip: bool = False,
    check: bool = False,
    **options: Any,
) -> TransportPlan:
    """Solve a batch of transportation problems (Equation 1).

    Moves ``supply`` to ``demand`` at the least total of ``flow * cost``. Solvers:

    - ``simplex``: exact, the package's own, on CPU and CUDA; above 64 nodes a side (one less with
      ``partial``) CPU problems go to ``pot``.
    - ``pot``: exact, float64, any size, CPU.
    - ``opencv``: the paper's inference solver, ``cv2.EMD``, float32, CPU; without potentials.
    - ``sinkhorn``: entropic, any torch device; options ``epsilon``, ``iterations``, ``tolerance``.
    - ``qp``: the paper's interior point with its quadratic term, any torch device; options
      ``form``, ``strength``, ``max_iterations``.

    The plan carries gradients under ``sinkhorn`` and ``qp`` only; :func:`emd` does under every one.

    Args:
        cost: Ground costs of any sign and finite scale, in float32 or float64; half precision is
            raised to float32. Shape: ``[..., N, M]``.
        supply: Mass of each supplier, zero or more. Shape: ``[..., N]``.
        demand: Mass of each demander, zero or more; scaled to supply's total. Shape: ``[..., M]``.
        solver: See above.
        partial: Allow unequal totals: the lighter side moves all its mass (Rubner's EMD). The
            potentials of the heavier side are then at most zero, and zero where mass stays.
        need_flow: Return the flow.
        need_potentials: Return the potentials, where the solver has them.
        cpu_round_trip: Copy tensors of another device to the CPU, solve there, copy the plan back:
            nothing does so unasked.
        check: For ``simplex`` on CUDA: wait for the device and raise faults of values here. Without
            it a faulty problem's results are NaN, and a later call or
            :func:`raise_pending_faults` raises. All else raises here.
        **options: The solver's own, named above.

    Returns:
        The plan; ``value`` has the leading dimensions' shape, and an empty batch is a valid one.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or an option is not the solver's.
        ValueError: If shapes or devices do not match, or a value is not valid; argument, shape and
            problem are named.
        RuntimeError: If the solver does not reach the optimum.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.5]])
        >>> plan = solve(cost, torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.5, 0.5]))
        >>> plan.value
        tensor(0.1250)
        >>> plan.flow
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500],
                [0.0000, 0.2500]])
    """
    cost, supply, demand = check_problem(cost, supply, demand)
    check_solver(solver, options)
    with torch.set_grad_enabled(torch.is_grad_enabled() and SOLVERS[solver].differentiable):
        return solve_checked(
            cost,
            supply,
            demand,
            solver=solver,
            partial=partial,
            need_flow=need_flow,
            need_potentials=need_potentials,
            cpu_round_trip=cpu_round_trip,
            check=check,
            **options,
        )


def check_solver(name: str, options: dict[str, Any]) -> None:
    """Raise unless ``name`` is a solver and every option one of its own."""
    if name not in SOLVERS or options:
        solver = SOLVERS[check_choice("solver", name, list(SOLVERS))]
        own = _own_options(_load(solver)) if solver.differentiable else []
        foreign = sorted(set(options) - set(own))
        if foreign:
            takes = f"takes the options {', '.join(own)}" if own else "takes no options"
            raise TypeError(f"solver {name!r} {takes}; got {', '.join(foreign)}")


def solve_checked(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    solver: str,
    partial: bool,
    need_flow: bool,
    need_potentials: bool,
    cpu_round_trip: bool,
    check: bool,
    **options: Any,
) -> TransportPlan:
    """:func:`solve` on tensors that passed :func:`check_problem`, in the caller's grad mode."""
    leading = cost.shape[:-2]
    if cost.numel() == 0:
        return empty_plan(
            cost, supply, demand, need_flow=need_flow, need_potentials=need_potentials
        )
    device = cost.device
    if cpu_round_trip and device.type != "cpu":
        cost, supply, demand = cost.cpu(), supply.cpu(), demand.cpu()
    chosen = _choose(solver, max(cost.shape[-2:]) + partial, cost.device.type)
    cost, supply, demand = flatten_problem(cost, supply, demand)
    if not torch.is_grad_enabled():
        cost, supply, demand = cost.detach(), supply.detach(), demand.detach()
    try:
        with _full_precision(cost.device.type):
            if partial:
                check_values(cost, supply, demand, partial=True)
                cost, supply, demand = pad_lighter_side(cost, supply, demand)
            if not chosen.checks_values:
                totals = check_values(cost, supply, demand)
                demand = demand * (totals[0] / totals[1]).detach().to(demand.dtype)[:, None]
            if chosen is _CUDA_SIMPLEX:
                options = {"check": check}
            plan = _load(chosen)(
                cost,
                supply,
                demand,
                need_flow=need_flow,
                need_potentials=need_potentials,
                **options,
            )
            if partial:
                plan = unpad_plan(plan, supply, demand)
    except InvalidProblemError as fault:
        raise fault.in_batch(leading) from None
    return unflatten_plan(plan, leading, device)


def _choose(name: str, nodes: int, device_type: str) -> Solver:
    """The solver for this size and device, or an error that names those that would do."""
    if name == "simplex" and device_type == "cuda" and nodes <= SIMPLEX_NODES:
        return _CUDA_SIMPLEX
    solver = SOLVERS[name]
    if name == "simplex" and nodes > SIMPLEX_NODES:
        name, solver = f"simplex above {SIMPLEX_NODES} nodes a side (pot)", SOLVERS["pot"]
    if solver.devices and device_type not in solver.devices:
        raise ValueError(
            f"solver: {name} runs on {' and '.join(solver.devices)}, got tensors on {device_type}; "
            "choose solver='sinkhorn' or 'qp', which run there, "
            "or pass cpu_round_trip=True to copy to the CPU and back"
        )
    return solver


@cache
def native_is_built() -> bool:
    """Whether this installation has the native core."""
    return find_spec(f"{_PACKAGE}._native") is not None


def runs_natively(name: str, cost: Tensor) -> bool:
    """Whether :func:`solve` would give ``cost`` to the native simplex."""
    on_cpu = cost.device.type == "cpu"
    return name == "simplex" and on_cpu and max(cost.shape[-2:]) <= SIMPLEX_NODES


def _load(solver: Solver) -> Callable[..., TransportPlan]:
    module, function = solver.path.split(":")
    loaded: Callable[..., TransportPlan] = getattr(import_module(f"{_PACKAGE}.{module}"), function)
    return loaded


def _own_options(function: Callable[..., TransportPlan]) -> list[str]:
    shared = {"need_flow", "need_potentials"}
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in shared]


def _full_precision(device_type: str) -> AbstractContextManager[None]:
    """Autocast off where it is on: a plan in half precision satisfies no constraint."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
