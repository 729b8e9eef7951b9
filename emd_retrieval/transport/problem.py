"""The transportation problem at the border: checks, wording of faults, scaling, unequal totals.

Every solver trusts what passed here; none of them lives here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from emd_retrieval._checks import check_tensor
from emd_retrieval.transport.plan import TransportPlan

BALANCE_TOLERANCE = 1e-4
"""Largest relative difference of supply's and demand's totals that counts as rounding."""

MOST_COST = {torch.float32: 2.0**125, torch.float64: 2.0**1021}
"""The largest size of a cost: potentials are sums of a few, and their dtype must hold those too."""

MOST_VALUE = {
    torch.float32: float.fromhex("0x1.ffp127"),
    torch.float64: float.fromhex("0x1.ffp1023"),
}
"""The largest cost x mass: a value that the dtype holds, with room for its rounding."""


class InvalidProblemError(ValueError):
    """Values that make one problem of a batch invalid.

    Args:
        words: What is wrong with it.
        index: The problem, in the flat batch.
        batch_shape: The leading dimensions in which the message names it.
    """

    def __init__(self, words: str, index: int, batch_shape: Sequence[int]) -> None:
        place = []
        rest = index
        for size in reversed(batch_shape):
            rest, position = divmod(rest, size)
            place.append(position)
        where = f"; problem {place[::-1]} of leading shape {list(batch_shape)}" if place else ""
        super().__init__(words + where)
        self.words = words
        self.index = index

    def in_batch(self, batch_shape: Sequence[int]) -> InvalidProblemError:
        """The same fault, told in the leading dimensions that the user passed."""
        return InvalidProblemError(self.words, self.index, batch_shape)


def check_problem(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check types, shapes and devices; return the three in one dtype, float32 or float64.

    Args:
        cost: Shape: ``[..., N, M]``.
        supply: Shape: ``[..., N]``.
        demand: Shape: ``[..., M]``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not match, or a side has no node.
    """
    sizes = check_tensor("cost", cost, ["...", "N", "M"])
    check_tensor("supply", supply, ["...", "N"], sizes=sizes)
    check_tensor("demand", demand, ["...", "M"], sizes=sizes)
    leading = cost.shape[:-2]
    if sizes["N"] == 0 or sizes["M"] == 0:
        raise ValueError(
            f"cost: expected at least one supplier and one demander, got shape {list(cost.shape)}"
        )
    for name, weights in (("supply", supply), ("demand", demand)):
        if weights.shape[:-1] != leading:
            raise ValueError(
                f"{name}: expected cost's leading dimensions {list(leading)}, "
                f"got shape {list(weights.shape)} beside cost {list(cost.shape)}"
            )
        if weights.device != cost.device:
            raise ValueError(
                f"{name}: expected cost's device {cost.device}, got a tensor on {weights.device}"
            )
    if not (cost.dtype == supply.dtype == demand.dtype) or cost.element_size() < 4:
        # Half precision is what autocast leaves behind; a plan needs float32 at least.
        dtype = torch.promote_types(cost.dtype, torch.promote_types(supply.dtype, demand.dtype))
        dtype = torch.promote_types(dtype, torch.float32)
        cost, supply, demand = cost.to(dtype), supply.to(dtype), demand.to(dtype)
    return cost, supply, demand


def check_values(
    cost: Tensor, supply: Tensor, demand: Tensor, *, partial: bool = False
) -> tuple[Tensor, Tensor]:
    """Check a flat batch's values and return the totals; on CUDA this waits for the device.

    Args:
        cost: Shape: ``[B, N, M]``.
        supply: Shape: ``[B, N]``.
        demand: Shape: ``[B, M]``.
        partial: Allow unequal totals.

    Returns:
        The totals of supply and demand in float64. Shapes: ``[B]``, ``[B]``.

    Raises:
        InvalidProblemError: If a cost is not finite or above :data:`MOST_COST` in size, cost x mass
            is above :data:`MOST_VALUE`, a weight is negative or not finite, a total is zero, or the
            totals differ by more than :data:`BALANCE_TOLERANCE` (without ``partial``).
    """
    supply_total = supply.sum(-1, dtype=torch.float64)
    demand_total = demand.sum(-1, dtype=torch.float64)
    # NaN fails every comparison, hence the positive wording of each condition.
    # Not aminmax: it uses torch's threads for any size, which a forked process no longer has.
    lowest, highest = cost.amin((-2, -1)), cost.amax((-2, -1))
    largest_cost = torch.maximum(-lowest, highest).double()
    sound = (
        (largest_cost <= MOST_COST[cost.dtype])
        & (largest_cost * supply_total <= MOST_VALUE[cost.dtype])
        & (supply.amin(-1) >= 0)
        & (demand.amin(-1) >= 0)
        & (supply_total > 0)
        & (demand_total > 0)
        & torch.isfinite(supply_total + demand_total)
    )
    if not partial:
        larger = torch.maximum(supply_total, demand_total)
        sound &= (supply_total - demand_total).abs() <= BALANCE_TOLERANCE * larger
    if not bool(sound.all()):
        raise_fault(int((~sound).nonzero()[0]), cost, supply, demand)
    return supply_total, demand_total


def raise_fault(index: int, cost: Tensor, supply: Tensor, demand: Tensor) -> NoReturn:
    """Raise :class:`InvalidProblemError` with words for what is wrong with problem ``index``.

    For :func:`check_values` and for solvers that check values themselves.

    Args:
        index: The problem, in the flat batch.
        cost: Shape: ``[B, N, M]``.
        supply: Shape: ``[B, N]``.
        demand: Shape: ``[B, M]``.
    """
    words = _describe_fault(cost[index], supply[index], demand[index])
    raise InvalidProblemError(words, index, cost.shape[:1])


def _describe_fault(cost: Tensor, supply: Tensor, demand: Tensor) -> str:
    bad_cost = ~torch.isfinite(cost)
    if bool(bad_cost.any()):
        row, column = (int(i) for i in bad_cost.nonzero()[0])
        return (
            f"cost: expected finite values, got {float(cost[row, column])} at [{row}, {column}] "
            f"of [N, M] = {list(cost.shape)}"
        )
    largest = float(cost.abs().max())
    if largest > MOST_COST[cost.dtype]:
        return (
            f"cost: expected costs of at most {MOST_COST[cost.dtype]:.3g} in size, so that "
            f"{cost.dtype} holds sums of them, got {largest:.3g}"
        )
    totals: list[float] = []
    for name, weights in (("supply", supply), ("demand", demand)):
        bad = ~(torch.isfinite(weights) & (weights >= 0))
        if bool(bad.any()):
            node = int(bad.nonzero()[0])
            return (
                f"{name}: expected finite weights of zero or more, got {float(weights[node])} "
                f"at node {node} of {len(weights)}"
            )
        totals.append(float(weights.sum(dtype=torch.float64)))
        if totals[-1] == 0:
            return f"{name}: expected a positive total, got zero from {len(weights)} weights"
    if not largest * totals[0] <= MOST_VALUE[cost.dtype]:
        return (
            f"cost, supply: expected costs whose product with the mass {cost.dtype} holds, got "
            f"costs as large as {largest:g} and a mass of {totals[0]:g} (scale one of them down)"
        )
    return (
        f"supply, demand: expected totals equal to {BALANCE_TOLERANCE:g} relatively, got "
        f"{totals[0]:.7g} and {totals[1]:.7g} (scale both to one total, or pass partial=True)"
    )


def flatten_problem(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same problems, contiguous, as ``[B, N, M]``, ``[B, N]``, ``[B, M]``."""
    if cost.dim() != 3:
        N, M = cost.shape[-2:]
        count = math.prod(cost.shape[:-2])
        cost, supply, demand = (
            cost.reshape(count, N, M),
            supply.reshape(count, N),
            demand.reshape(count, M),
        )
    return cost.contiguous(), supply.contiguous(), demand.contiguous()


def unflatten_plan(
    plan: TransportPlan, leading: Sequence[int], device: torch.device
) -> TransportPlan:
    """The plan of a flat batch with the user's leading dimensions, on the user's device."""
    if len(leading) == 1 and plan.value.device == device:
        return plan

    def restore(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device).reshape(*leading, *part.shape[1:])

    return TransportPlan(
        value=plan.value.to(device).reshape(leading),
        flow=restore(plan.flow),
        supply_potential=restore(plan.supply_potential),
        demand_potential=restore(plan.demand_potential),
    )


def empty_plan(
    cost: Tensor, supply: Tensor, demand: Tensor, *, need_flow: bool, need_potentials: bool
) -> TransportPlan:
    """The plan of a batch without problems; like any other, its value hangs on ``cost``."""
    return TransportPlan(
        value=cost.sum((-2, -1)),
        flow=torch.zeros_like(cost) if need_flow else None,
        supply_potential=torch.zeros_like(supply) if need_potentials else None,
        demand_potential=torch.zeros_like(demand) if need_potentials else None,
    )


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Costs moved and scaled into [0, 1], for solvers whose tolerances are not relative.

    Attributes:
        cost: In float64. Shape: ``[B, N, M]``.
        low: What was subtracted. Shape: ``[B, 1]``.
        scale: What the rest was divided by. Shape: ``[B, 1]``.
    """

    cost: Tensor
    low: Tensor
    scale: Tensor

    @classmethod
    def of(cls, cost: Tensor) -> UnitCost:
        """Scale each problem by its own range; a constant cost becomes zero."""
        exact = cost.double()
        low, high = exact.amin((-2, -1), True), exact.amax((-2, -1), True)
        scale = torch.where(high > low, high - low, 1.0)
        return cls((exact - low) / scale, low[:, 0], scale[:, 0])

    def restore_potentials(self, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials of the original costs from those of the scaled ones, supply's centred."""
        supply, demand = supply * self.scale, demand * self.scale + self.low
        centre = supply.mean(-1, keepdim=True)
        return supply - centre, demand + centre


def pad_lighter_side(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance unequal totals by one more node a side that costs nothing (Rubner's partial EMD).

    The new node of the lighter side takes the difference of the totals, that of the heavier side
    takes nothing, so one batch may hold both cases. Differentiable in all three.

    Shape:
        ``[B, N, M]``, ``[B, N]``, ``[B, M]`` become ``[B, N+1, M+1]``, ``[B, N+1]``, ``[B, M+1]``.
    """
    surplus = supply.sum(-1, True, dtype=torch.float64) - demand.sum(-1, True, dtype=torch.float64)
    surplus = surplus.to(cost.dtype)
    return (
        torch.nn.functional.pad(cost, (0, 1, 0, 1)),
        torch.cat([supply, torch.relu(-surplus)], -1),
        torch.cat([demand, torch.relu(surplus)], -1),
    )


def unpad_plan(plan: TransportPlan, supply: Tensor, demand: Tensor) -> TransportPlan:
    """The plan of unequal totals from that of :func:`pad_lighter_side`'s problem.

    Where there is a difference to absorb, the constant of the potentials is no longer free: more
    mass on the heavier side goes to the added node at no cost, so that node's potential is zero.

    Args:
        plan: Of the padded problem.
        supply: Padded. Shape: ``[B, N+1]``.
        demand: Padded. Shape: ``[B, M+1]``.
    """
    flow = plan.flow
    supply_potential, demand_potential = plan.supply_potential, plan.demand_potential
    if supply_potential is not None and demand_potential is not None:
        at_supply, at_demand = supply_potential[:, -1:], demand_potential[:, -1:]
        supply_potential, demand_potential = supply_potential[:, :-1], demand_potential[:, :-1]
        shift = torch.where(demand[:, -1:] > 0, at_demand, -supply_potential.mean(-1, True))
        shift = torch.where(supply[:, -1:] > 0, -at_supply, shift)
        supply_potential, demand_potential = supply_potential + shift, demand_potential - shift
    return TransportPlan(
        value=plan.value,
        flow=None if flow is None else flow[:, :-1, :-1],
        supply_potential=supply_potential,
        demand_potential=demand_potential,
    )
