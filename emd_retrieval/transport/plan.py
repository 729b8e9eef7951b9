"""The one result type that every transport solver returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TransportPlan:
    """The solution of a batch of transportation problems (Equation 1).

    Attributes:
        value: Total cost ``sum(flow * cost)`` of each problem, in units of cost x mass.
            Shape: ``[...]``.
        flow: Mass moved from each supplier to each demander; ``None`` on the value-only path.
            Shape: ``[..., N, M]``.
        supply_potential: LP dual of the supply constraints, in units of cost: d value / d supply.
            Shape: ``[..., N]``.
        demand_potential: LP dual of the demand constraints, in units of cost: d value / d demand.
            Shape: ``[..., M]``.

    The potentials are defined up to a constant that is added to one side and taken from the other;
    solvers here return them so that the supply potential is zero on average.
    """

    value: Tensor
    flow: Tensor | None
    supply_potential: Tensor | None
    demand_potential: Tensor | None
