"""A cheap lower bound of the transport value: it orders a shortlist before anything is solved."""

from __future__ import annotations

import torch
from torch import Tensor

from emd_retrieval.transport.problem import (
    InvalidProblemError,
    check_problem,
    check_values,
    flatten_problem,
)
from emd_retrieval.transport.solve import runs_natively


def lower_bound(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """Dual reduction bound: at most the value of :func:`solve`, up to rounding.

    Reducing rows, then columns, gives the feasible potentials ``u_i = min_j c_ij`` and
    ``v_j = min_i (c_ij - u_i)``, whose dual value ``sum(supply * u) + sum(demand * v)`` bounds
    Equation 1 from below; columns first gives another. The larger of the two is returned, without a
    gradient. Between sets of local features it is typically above nine tenths of the value.

    Args:
        cost: Shape: ``[..., N, M]``.
        supply: Shape: ``[..., N]``.
        demand: The same totals as ``supply``. Shape: ``[..., M]``.

    Returns:
        Bounds, in units of cost x mass. Shape: ``[...]``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not match, or a value is not valid.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.5]])
        >>> lower_bound(cost, torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]))
        tensor(0.2500)
    """
    cost, supply, demand = check_problem(cost, supply, demand)
    leading = cost.shape[:-2]
    if cost.numel() == 0:
        return cost.new_empty(leading)
    with torch.no_grad():
        problem = flatten_problem(cost, supply, demand)
        try:
            if runs_natively("simplex", cost):
                from emd_retrieval.transport.simplex import native_lower_bound

                return native_lower_bound(*problem).reshape(leading)
            return _lower_bound(*problem).reshape(leading)
        except InvalidProblemError as fault:
            raise fault.in_batch(leading) from None


def _lower_bound(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    supply_total, demand_total = check_values(cost, supply, demand)
    demand = demand * (supply_total / demand_total).to(demand.dtype)[:, None]
    rows_first = _reduction(cost, supply, demand)
    columns_first = _reduction(cost.mT, demand, supply)
    return torch.maximum(rows_first, columns_first).to(cost.dtype)


def _reduction(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    rows = cost.amin(-1)
    columns = (cost - rows[:, :, None]).amin(-2)
    # Summed in float64: the bound's order is to be that of exact arithmetic as nearly as it can.
    return (supply.double() * rows).sum(-1) + (demand.double() * columns).sum(-1)
