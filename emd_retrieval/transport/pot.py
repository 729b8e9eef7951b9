"""Exact transport by POT's network simplex in float64: any size, one problem at a time on the CPU.

The oracle of the tests, and the solver of problems that are too large for the native simplex.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emd_retrieval.transport.plan import TransportPlan
from emd_retrieval.transport.problem import UnitCost

_MAX_PIVOTS = 10_000_000


def solve_pot(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    need_flow: bool = True,
    need_potentials: bool = True,
) -> TransportPlan:
    """Solve Equation 1 with ``ot.emd``, in float64 whatever the dtype of ``cost``.

    Args:
        cost: Shape: ``[B, N, M]``.
        supply: Shape: ``[B, N]``.
        demand: Shape: ``[B, M]``.
        need_flow: Return the flow.
        need_potentials: Return the potentials.

    Returns:
        The plan, in the dtype of ``cost``.

    Raises:
        RuntimeError: If POT does not reach the optimum.
    """
    import ot

    dtype = cost.dtype
    # POT's tolerances are partly absolute: it gets costs of range one and weights of total one.
    unit = UnitCost.of(cost)
    mass = supply.sum(-1, dtype=torch.float64)
    unit_supply = supply.double() / mass[:, None]
    unit_demand = demand.double() / demand.sum(-1, True, dtype=torch.float64)

    flow = torch.empty_like(unit.cost)
    supply_potential = torch.empty_like(unit_supply)
    demand_potential = torch.empty_like(unit_demand)
    for k in range(len(cost)):
        plan, log = ot.emd(
            unit_supply[k].numpy(),
            unit_demand[k].numpy(),
            unit.cost[k].numpy(),
            numItermax=_MAX_PIVOTS,
            log=True,
            center_dual=False,
            check_marginals=False,
        )
        if log["warning"] is not None:
            raise RuntimeError(f"pot: problem {k} of the batch is not solved: {log['warning']}")
        flow[k] = torch.from_numpy(plan)
        supply_potential[k] = torch.from_numpy(log["u"])
        demand_potential[k] = torch.from_numpy(log["v"])

    flow *= mass[:, None, None]
    value = (flow * cost).sum((-2, -1))
    if not need_potentials:
        return TransportPlan(value.to(dtype), flow.to(dtype) if need_flow else None, None, None)
    supply_potential, demand_potential = unit.restore_potentials(
        *_certificate(
            unit.cost, supply_potential, demand_potential, unit_supply > 0, unit_demand > 0
        )
    )
    return TransportPlan(
        value=value.to(dtype),
        flow=flow.to(dtype) if need_flow else None,
        supply_potential=supply_potential.to(dtype),
        demand_potential=demand_potential.to(dtype),
    )


def _certificate(
    cost: Tensor, supply_potential: Tensor, demand_potential: Tensor, ships: Tensor, takes: Tensor
) -> tuple[Tensor, Tensor]:
    """Potentials that are dual feasible everywhere, from ones that are right where there is mass.

    POT leaves nodes of zero weight out and guesses their potentials. Two half c-transforms set
    them, and take rounding out of the others without lowering the dual value.
    """
    at_takers = torch.where(takes, demand_potential, -torch.inf)
    largest = (cost - at_takers[:, None, :]).amin(-1)
    supply_potential = torch.where(ships, supply_potential, largest)
    return supply_potential, (cost - supply_potential[:, :, None]).amin(-2)
