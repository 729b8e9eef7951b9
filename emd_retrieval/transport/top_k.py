"""The nearest candidates of each query, exactly, without solving every problem.

Candidates are solved in the order of their lower bounds until no bound is left that could beat the
k-th best value; the native simplex also gives a candidate up halfway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emd_retrieval._checks import check_choice, check_tensor
from emd_retrieval.transport.bounds import lower_bound
from emd_retrieval.transport.problem import InvalidProblemError, check_problem
from emd_retrieval.transport.solve import runs_natively, solve

_EXACT_SOLVERS = ("simplex", "pot")
_ROUND = 8
"""Fewest candidates of a query that are solved before the bounds are looked at again."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The nearest candidates of each query, nearest first.

    Attributes:
        distance: Value divided by mass (the sum of supply in float64, rounded to the costs' dtype),
            in units of cost. Shape: ``[..., k]``.
        index: Their places among the candidates. Shape: ``[..., k]``, int64.
        solved: How many problems of each query were solved to the end. Shape: ``[...]``, int64.
    """

    distance: Tensor
    index: Tensor
    solved: Tensor


def solve_top_k(
    cost: Tensor, supply: Tensor, demand: Tensor, k: int, *, solver: str = "simplex"
) -> TopK:
    """The ``k`` candidates of each query of least distance, in the order of full solving.

    A candidate's distance is its value divided by its mass, so that candidates of different mass
    compare; equal distances are ordered by index. The result is what solving all candidates and
    sorting them stably would give.

    Args:
        cost: One problem per query and candidate. Shape: ``[..., C, N, M]``.
        supply: Shape: ``[..., C, N]``.
        demand: The same totals as ``supply``. Shape: ``[..., C, M]``.
        k: From 1 to ``C``.
        solver: An exact one: ``"simplex"`` or ``"pot"``.

    Returns:
        Distances, indices and the number of problems solved, without gradients.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not match, a value is not valid, or ``k`` is out of
            range.
        RuntimeError: If the solver does not reach the optimum.

    Example:
        >>> cost = torch.tensor([3.0, 1.0, 2.0]).reshape(3, 1, 1)
        >>> mass = torch.ones(3, 1)
        >>> nearest = solve_top_k(cost, mass, mass, k=2)
        >>> nearest.index, nearest.distance
        (tensor([1, 2]), tensor([1., 2.]))
    """
    sizes = check_tensor("cost", cost, ["...", "C", "N", "M"])
    check_choice("solver", solver, _EXACT_SOLVERS)
    count = sizes["C"]
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1 to {count}, the number of candidates, got {k}")
    cost, supply, demand = check_problem(cost, supply, demand)
    leading = cost.shape[:-3]
    if cost.numel() == 0:
        distance = cost.new_empty(*leading, k)
        return TopK(distance, distance.long(), cost.new_empty(leading, dtype=torch.int64))
    try:
        with torch.no_grad():
            problem = (
                cost.reshape(-1, *cost.shape[-3:]).contiguous(),
                supply.reshape(-1, *supply.shape[-2:]).contiguous(),
                demand.reshape(-1, *demand.shape[-2:]).contiguous(),
            )
            if runs_natively(solver, cost):
                from emd_retrieval.transport.simplex import simplex_top_k

                distance, index, solved = simplex_top_k(*problem, k)
            else:
                distance, index, solved = _solve_by_bound(*problem, k, solver)
    except InvalidProblemError as fault:
        raise fault.in_batch(cost.shape[:-2]) from None
    return TopK(distance.reshape(*leading, k), index.reshape(*leading, k), solved.reshape(leading))


def _solve_by_bound(
    cost: Tensor, supply: Tensor, demand: Tensor, k: int, solver: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds over all queries, each solving a few candidates in the order of their bounds."""
    queries, count = cost.shape[:2]
    mass = supply.sum(-1, dtype=torch.float64).to(cost.dtype)
    bound, order = (lower_bound(cost, supply, demand) / mass).sort(dim=-1, stable=True)
    # Bounds and values carry a few roundings of the largest cost each: a candidate is left out only
    # where these cannot have lifted its bound above its value.
    finfo = torch.finfo(cost.dtype)
    slack = 16 * finfo.eps * cost.abs().amax((-3, -2, -1))
    # Near the smallest numbers values are multiples of the smallest, which a small mass magnifies.
    least = finfo.smallest_normal * finfo.eps
    slack += sum(cost.shape[-2:]) * least * (1 + 1 / mass.amin(-1))
    distance = torch.full_like(mass, torch.inf)
    solved = torch.zeros(queries, dtype=torch.int64, device=cost.device)
    threshold = distance[:, 0]
    start = 0
    while start < count:
        stop = min(count, start + max(k, _ROUND))
        promising = bound[:, start:stop] <= (threshold + slack)[:, None]
        query, place = promising.nonzero(as_tuple=True)
        if len(query) == 0:
            break
        chosen = query, order[query, start + place]
        plan = solve(
            cost[chosen],
            supply[chosen],
            demand[chosen],
            solver=solver,
            need_flow=False,
            need_potentials=False,
        )
        distance[chosen] = plan.value / mass[chosen]
        solved += torch.bincount(query, minlength=queries)
        threshold = distance.kthvalue(k, dim=-1).values
        start = stop
    nearest, index = distance.sort(dim=-1, stable=True)
    return nearest[:, :k], index[:, :k], solved
