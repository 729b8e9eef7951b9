"""Problems of every kind, an independent linear-programming oracle, and one fixture per solver."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from scipy.optimize import linprog
from torch import Tensor

from emd_retrieval.transport import TransportPlan, available_solvers

Problem = tuple[Tensor, Tensor, Tensor]

# Fixtures of solvers and of problem makers hold no state, so sharing them among examples is sound.
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **_SHARED)
settings.register_profile("deep", max_examples=2000, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

EXACT_SOLVERS = ("simplex", "pot")
WEIGHT_KINDS = ("relu", "equal", "integer", "zeros", "one_hot", "lognormal")
COST_KINDS = ("cosine", "zero", "constant", "quantised", "duplicated", "negative", "huge", "tiny")
SHAPES = ((1, 1), (1, 5), (4, 1), (3, 4), (14, 14), (9, 16))

_WEIGHTS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "generic": lambda g, n: torch.rand(n, generator=g, dtype=torch.float64) + 0.1,
    "relu": lambda g, n: torch.randn(n, generator=g, dtype=torch.float64).relu() + 1e-3,
    "equal": lambda g, n: torch.ones(n, dtype=torch.float64),
    "integer": lambda g, n: torch.randint(1, 5, (n,), generator=g).double(),
    "zeros": lambda g, n: _some_zero(torch.rand(n, generator=g, dtype=torch.float64) + 0.1, g),
    "one_hot": lambda g, n: torch.full((n,), 1e-6, dtype=torch.float64).index_fill(
        0, torch.randint(n, (1,), generator=g), 1.0
    ),
    "lognormal": lambda g, n: torch.randn(n, generator=g, dtype=torch.float64).mul(4).exp(),
}


def _some_zero(weights: Tensor, generator: torch.Generator) -> Tensor:
    keep = torch.rand(len(weights), generator=generator) > 0.4
    keep[torch.randint(len(weights), (1,), generator=generator)] = True
    return weights * keep


def _cosine_cost(generator: torch.Generator, N: int, M: int) -> Tensor:
    features = torch.randn(N + M, 16, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.normalize(features + 0.5, dim=-1)
    return 1 - features[:N] @ features[N:].T


def _cost(kind: str, generator: torch.Generator, N: int, M: int) -> Tensor:
    cost = _cosine_cost(generator, N, M)
    match kind:
        case "zero":
            return torch.zeros_like(cost)
        case "constant":
            return torch.full_like(cost, 0.7)
        case "quantised":
            return (cost * 4).round() / 4
        case "duplicated":
            return cost[:, torch.arange(M) // 2][torch.arange(N) // 2]
        case "negative":
            return cost - 3
        case "huge":
            return cost**3 * 1e6
        case "tiny":
            return cost * 1e-6
    return cost


def make_problem(
    N: int,
    M: int,
    *,
    batch: int = 3,
    weights: str = "relu",
    cost: str = "cosine",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """A seeded batch; totals are one, and the numbers are those that ``dtype`` can hold."""
    generator = torch.Generator().manual_seed(seed)
    costs, supplies, demands = [], [], []
    for _ in range(batch):
        costs.append(_cost(cost, generator, N, M))
        supply, demand = _WEIGHTS[weights](generator, N), _WEIGHTS[weights](generator, M)
        supplies.append(supply / supply.sum())
        demands.append(demand / demand.sum())
    return (
        torch.stack(costs).to(dtype),
        torch.stack(supplies).to(dtype),
        torch.stack(demands).to(dtype),
    )


def linear_programme(
    cost: Tensor, supply: Tensor, demand: Tensor, *, partial: bool = False
) -> Tensor:
    """Values by HiGHS, which shares no code with any solver under test. Shape: ``[B]``."""
    N, M = cost.shape[1:]
    rows = np.kron(np.eye(N), np.ones(M))
    columns = np.kron(np.ones(N), np.eye(M))
    values = []
    for c, s, d in zip(
        cost.double().numpy(), supply.double().numpy(), demand.double().numpy(), strict=True
    ):
        scale = np.abs(c).max() or 1.0
        if partial:
            constraints = {
                "A_ub": np.vstack([rows, columns]),
                "b_ub": np.concatenate([s, d]),
                "A_eq": np.ones((1, N * M)),
                "b_eq": [min(s.sum(), d.sum())],
            }
        else:
            # One demand row follows from the rest; leaving it out forgives unequal rounding.
            constraints = {
                "A_eq": np.vstack([rows, columns[:-1]]),
                "b_eq": np.concatenate([s, d[:-1] * s.sum() / d.sum()]),
            }
        result = linprog(
            c.ravel() / scale,
            **constraints,
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        assert result.status == 0, result.message
        values.append(result.fun * scale)
    return torch.tensor(values, dtype=torch.float64)


def error_unit(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """What a value's error is measured in: cost range x mass, or |cost| x mass where that is more.

    The latter because a result in float32 cannot be nearer than a rounding of the costs themselves.
    """
    cost = cost.double()
    spread = cost.amax((-2, -1)) - cost.amin((-2, -1))
    unit = torch.maximum(spread, cost.abs().amax((-2, -1)))
    return torch.where(unit > 0, unit, 1.0) * supply.double().sum(-1)


def assert_certified(problem: Problem, plan: TransportPlan, tolerance: float = 1e-6) -> None:
    """Check that flow and potentials prove each other optimal: feasible, slack, of equal value."""
    assert plan.flow is not None
    assert plan.supply_potential is not None
    assert plan.demand_potential is not None
    cost, supply, demand = (part.double() for part in problem)
    flow, value = plan.flow.double(), plan.value.double()
    u, v = plan.supply_potential.double(), plan.demand_potential.double()
    mass = supply.sum(-1)
    allowed = tolerance * error_unit(*problem)

    assert (flow >= 0).all()
    assert ((flow.sum(-1) - supply).abs().amax(-1) <= tolerance * mass).all()
    assert ((flow.sum(-2) - demand).abs().amax(-1) <= tolerance * mass).all()
    assert ((value - (flow * cost).sum((-2, -1))).abs() <= allowed).all()

    reduced = cost - u[:, :, None] - v[:, None, :]
    assert (reduced.amin((-2, -1)) * mass >= -allowed).all()
    assert ((flow * reduced).sum((-2, -1)).abs() <= allowed).all()
    assert ((value - (supply * u).sum(-1) - (demand * v).sum(-1)).abs() <= allowed).all()
    assert (u.mean(-1).abs() * mass <= allowed).all()


@pytest.fixture(params=available_solvers())
def solver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[name for name in available_solvers() if name in EXACT_SOLVERS])
def exact_solver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(name="make_problem", scope="session")
def make_problem_fixture() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Tensor]:
    return linear_programme


@pytest.fixture(scope="session")
def unit() -> Callable[..., Tensor]:
    return error_unit


@pytest.fixture(scope="session")
def certify() -> Callable[..., None]:
    return assert_certified


@pytest.fixture(scope="session")
def every_kind() -> list[tuple[str, Problem, Tensor]]:
    """Name, problems and oracle values for every kind of weights and costs at several shapes."""
    kinds = []
    for seed, (weights, cost, (N, M)) in enumerate(product(WEIGHT_KINDS, COST_KINDS, SHAPES)):
        problem = make_problem(N, M, batch=2, weights=weights, cost=cost, seed=seed)
        name = f"{weights} weights, {cost} costs, {N}x{M}"
        kinds.append((name, problem, linear_programme(*problem)))
    return kinds
