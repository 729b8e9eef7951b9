"""The package's own exact solver on the CPU: the network simplex of the native core, for batches.

Tensors become arrays here and faults become errors; the algorithm is in ``native/``, its CUDA twin
in ``cuda/``. Threads follow :func:`torch.get_num_threads`.
"""

from __future__ import annotations

from typing import Any, NoReturn, overload

import numpy.typing as npt
import torch
from torch import Tensor

from emd_retrieval._checks import check_choice
from emd_retrieval.transport import _native
from emd_retrieval.transport.plan import TransportPlan
from emd_retrieval.transport.problem import InvalidProblemError, raise_fault

MAX_NODES: int = _native.MAX_NODES
"""Most nodes a side."""

MOST_PIVOTS = 100_000
"""Pivots after which a problem counts as failed; hard ones of 64 x 64 nodes take hundreds."""


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that the solver is built for and this CPU runs, the default first."""
    return tuple(_native.instruction_sets())


def solve_simplex(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    need_flow: bool = True,
    need_potentials: bool = True,
    most_pivots: int = MOST_PIVOTS,
    instruction_set: str | None = None,
) -> TransportPlan:
    """Solve a flat batch exactly with the network simplex (Equation 1).

    Costs are compared as integers of 25 bits over each problem's range (24 where both sides have
    more than 32 nodes). Float32 costs ``1 - cosine`` lose nothing by it up to 32 nodes and at most
    ``2^-24`` a unit of mass above; for any others the value is within ``2^-23`` of range x mass
    (``2^-24`` up to 32 nodes). It is the exact cost of the returned flow. The potentials are
    feasible to within ``2e-7`` of the range, or of the costs where float32 holds them no better.

    Args:
        cost: Float32 or float64 on the CPU, contiguous, of any finite scale and sign.
            Shape: ``[B, N, M]``, with N and M of at most 64.
        supply: Zero or more, with a positive total. Shape: ``[B, N]``.
        demand: Scaled to supply's total, from which it may differ by rounding. Shape: ``[B, M]``.
        need_flow: Return the flow.
        need_potentials: Return the potentials.
        most_pivots: Bound on the pivots of one problem.
        instruction_set: One of :func:`instruction_sets`; every one gives the same bits.

    Raises:
        InvalidProblemError: If a cost is not finite or its size above an eighth of the dtype's
            range, cost x mass is more than the dtype holds, a weight is negative or not finite, a
            total is zero or the totals differ by more than a relative 1e-4.
        ValueError: If the instruction set is not there.
        RuntimeError: If a problem takes more than ``most_pivots`` pivots.
    """
    plan = TransportPlan(
        value=cost.new_empty(len(cost)),
        flow=torch.empty_like(cost) if need_flow else None,
        supply_potential=torch.empty_like(supply) if need_potentials else None,
        demand_potential=torch.empty_like(demand) if need_potentials else None,
    )
    fault, index, _ = _native.solve(
        _array(cost),
        _array(supply),
        _array(demand),
        _array(plan.value),
        _array(plan.flow),
        _array(plan.supply_potential),
        _array(plan.demand_potential),
        most_pivots,
        torch.get_num_threads(),
        _runnable(instruction_set),
    )
    if fault is not None:
        _raise(fault, index, cost, supply, demand, most_pivots)
    return plan


def native_lower_bound(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """Bounds of :func:`emd_retrieval.transport.lower_bound` for a flat batch, by the native core.

    Rounding is taken off, so that in exact arithmetic none is above its problem's optimum.

    Args:
        cost: As for :func:`solve_simplex`. Shape: ``[B, N, M]``.
        supply: Shape: ``[B, N]``.
        demand: Shape: ``[B, M]``.

    Returns:
        Bounds in units of cost x mass. Shape: ``[B]``.

    Raises:
        InvalidProblemError: See :func:`solve_simplex`.
    """
    bound = cost.new_empty(len(cost))
    fault, index, _ = _native.lower_bound(
        _array(cost), _array(supply), _array(demand), _array(bound), torch.get_num_threads(), None
    )
    if fault is not None:
        _raise(fault, index, cost, supply, demand, MOST_PIVOTS)
    return bound


def simplex_top_k(
    cost: Tensor, supply: Tensor, demand: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` candidates of least distance of each query, without solving all of them to the end.

    Candidates are solved in the order of their reduction bounds until no bound is left below the
    k-th best distance; the simplex itself stops where its potentials prove a candidate worse than
    that. Distances, indices and order (ties by index) are those of solving every candidate.

    Args:
        cost: As for :func:`solve_simplex`, with C candidates a query. Shape: ``[Q, C, N, M]``.
        supply: Shape: ``[Q, C, N]``.
        demand: Shape: ``[Q, C, M]``.
        k: From 1 to C.

    Returns:
        Distances, ascending: each value divided by its mass, supply summed in float64 and rounded
        to the costs' dtype; their candidates; the number of candidates solved to the end.
        Shapes: ``[Q, k]``, ``[Q, k]``, ``[Q]``.

    Raises:
        InvalidProblemError: See :func:`solve_simplex`; every candidate is checked.
        ValueError: If ``k`` is out of range.
        RuntimeError: See :func:`solve_simplex`.
    """
    Q, C = cost.shape[:2]
    if not 1 <= k <= C:
        raise ValueError(f"k: expected 1 to {C}, the number of candidates, got {k}")
    cost, supply, demand = (part.flatten(0, 1) for part in (cost, supply, demand))
    distance = cost.new_empty(Q, k)
    index = torch.empty(Q, k, dtype=torch.int64)
    solved = torch.empty(Q, dtype=torch.int64)
    if Q == 0:
        return distance, index, solved
    fault, place, _ = _native.top_k(
        _array(cost),
        _array(supply),
        _array(demand),
        _array(supply.sum(-1, dtype=torch.float64).to(supply.dtype)),
        _array(distance),
        _array(index),
        _array(solved),
        MOST_PIVOTS,
        torch.get_num_threads(),
        None,
    )
    if fault is not None:
        try:
            _raise(fault, place, cost, supply, demand, MOST_PIVOTS)
        except InvalidProblemError as error:
            raise error.in_batch([Q, C]) from None
    return distance, index, solved


def add_flow_products(
    flow: Tensor,
    scale: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    left_gradient: Tensor | None,
    right_gradient: Tensor | None,
    upper: bool,
) -> None:
    """Add what flows between the sets of a grid carry over to the gradient of the sets' nodes.

    For the pair of left set q and right set r: ``scale * flow @ right[r]`` to ``left_gradient[q]``,
    ``scale * flow^T @ left[q]`` to ``right_gradient[r]``. Only the arcs with flow are touched, a
    seventh of them at 14 x 14. The sums do not depend on the number of threads.

    Args:
        flow: Pairs row after row; on the CPU and contiguous, as all of these.
            Shape: ``[Q * R, N, M]``, or ``[Q * (Q + 1) / 2, N, M]`` of the upper half.
        scale: Of each pair. Shape: that of the pairs.
        left: Shape: ``[Q, N, D]``.
        right: Shape: ``[R, M, D]``.
        left_gradient: Added to, unless it is ``None``. Shape: ``[Q, N, D]``.
        right_gradient: The same; it may be the same tensor. Shape: ``[R, M, D]``.
        upper: The flows are those of the upper half, its diagonal included, of a square grid.
    """
    _native.add_flow_products(
        _array(flow),
        _array(scale),
        _array(left),
        _array(right),
        _array(left_gradient),
        _array(right_gradient),
        upper,
        torch.get_num_threads(),
    )


@overload
def _array(tensor: Tensor) -> npt.NDArray[Any]: ...
@overload
def _array(tensor: Tensor | None) -> npt.NDArray[Any] | None: ...
def _array(tensor: Tensor | None) -> npt.NDArray[Any] | None:
    """The tensor's memory; nanobind takes it from NumPy at a tenth of what DLPack costs torch."""
    if tensor is None:
        return None
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()


def _runnable(instruction_set: str | None) -> str | None:
    if instruction_set is None:
        return None
    return check_choice("instruction_set", instruction_set, instruction_sets())


def _raise(
    fault: str, index: int, cost: Tensor, supply: Tensor, demand: Tensor, most_pivots: int
) -> NoReturn:
    if fault == "pivot_overrun":
        raise RuntimeError(
            f"solver 'simplex': problem {index} of {len(cost)} takes over {most_pivots} pivots "
            f"(cost [N, M] = {list(cost.shape[1:])}); please report it, and use solver='pot' for it"
        )
    raise_fault(index, cost, supply, demand)
