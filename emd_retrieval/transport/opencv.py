"""The paper's inference solver: OpenCV's ``cv2.EMD``, float32, one problem at a time on the CPU.

It returns the flow but no potentials, so weights get no gradient from it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from emd_retrieval.transport.plan import TransportPlan
from emd_retrieval.transport.problem import UnitCost


def solve_opencv(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    need_flow: bool = True,
    need_potentials: bool = True,
) -> TransportPlan:
    """Solve Equation 1 with ``cv2.EMD``; its float32 leaves errors of some 1e-5 of range x mass.

    Args:
        cost: Shape: ``[B, N, M]``.
        supply: Shape: ``[B, N]``.
        demand: Shape: ``[B, M]``.
        need_flow: Return the flow.
        need_potentials: Taken because every solver takes it; OpenCV has none to return.

    Returns:
        The plan, in the dtype of ``cost``, with ``None`` for the potentials.

    Raises:
        RuntimeError: If OpenCV does not solve a problem.
    """
    import cv2

    unit = UnitCost.of(cost)
    mass = supply.sum(-1, dtype=torch.float64)
    unit_cost = unit.cost.float().numpy()
    unit_supply = (supply.double() / mass[:, None]).float()[:, :, None].numpy()
    unit_demand = (demand.double() / mass[:, None]).float()[:, :, None].numpy()
    flow = np.empty(cost.shape, np.float32)
    for k in range(len(cost)):
        try:
            flow[k] = cv2.EMD(unit_supply[k], unit_demand[k], cv2.DIST_USER, unit_cost[k])[2]
        except cv2.error as error:
            raise RuntimeError(
                f"opencv: problem {k} of the batch is not solved: {error}"
            ) from error
    # Rounding inside OpenCV can leave flows below zero, by about 1e-5 of the mass.
    exact_flow = torch.from_numpy(flow).double().clamp_(min=0) * mass[:, None, None]
    value = (exact_flow * cost).sum((-2, -1))
    return TransportPlan(
        value=value.to(cost.dtype),
        flow=exact_flow.to(cost.dtype) if need_flow else None,
        supply_potential=None,
        demand_potential=None,
    )
