"""The border: every kind of bad input is refused with the argument, the problem and the shape."""

from __future__ import annotations

import math

import pytest
import torch

from emd_retrieval.transport import emd, lower_bound, solve, solve_top_k

SPOILED_VALUES = [
    ("cost", (1, 2, 3, 4), math.nan, r"cost: expected finite values, got nan at \[3, 4\]"),
    ("cost", (0, 1, 0, 0), math.inf, r"cost: expected finite values, got inf at \[0, 0\]"),
    ("cost", (1, 0, 2, 1), -math.inf, r"cost: expected finite values, got -inf at \[2, 1\]"),
    ("supply", (1, 1, 3), -0.25, "supply: expected finite weights .*, got -0.25 at node 3 of 4"),
    ("supply", (0, 2, 0), math.nan, "supply: expected finite weights .*, got nan at node 0 of 4"),
    ("demand", (1, 2, 4), -1.0, "demand: expected finite weights .*, got -1.0 at node 4 of 5"),
    ("demand", (0, 0, 1), math.inf, "demand: expected finite weights .*, got inf at node 1 of 5"),
    ("supply", (1, 2), 0.0, "supply: expected a positive total, got zero from 4 weights"),
    ("demand", (0, 1), 0.0, "demand: expected a positive total, got zero from 5 weights"),
    ("demand", (1, 0), 0.25, "supply, demand: expected totals equal to 0.0001.*got 1 and 1.25"),
]


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    return {
        "cost": torch.rand(2, 3, 4, 5, generator=generator),
        "supply": torch.full((2, 3, 4), 1 / 4),
        "demand": torch.full((2, 3, 5), 1 / 5),
    }


@pytest.mark.parametrize(("argument", "place", "value", "message"), SPOILED_VALUES)
def test_bad_value_names_argument_and_problem(solver, problem, argument, place, value, message):
    problem[argument][place] = value
    where = rf"; problem \[{place[0]}, {place[1]}\] of leading shape \[2, 3\]"
    with pytest.raises(ValueError, match=message + ".*" + where):
        solve(**problem, solver=solver)
    with pytest.raises(ValueError, match=message + ".*" + where):
        emd(**problem, solver=solver)


@pytest.mark.parametrize(("argument", "place", "value", "message"), SPOILED_VALUES)
def test_bounds_and_top_k_refuse_the_same(problem, argument, place, value, message):
    problem[argument][place] = value
    where = rf"; problem \[{place[0]}, {place[1]}\] of leading shape \[2, 3\]"
    with pytest.raises(ValueError, match=message + ".*" + where):
        lower_bound(**problem)
    with pytest.raises(ValueError, match=message + ".*" + where):
        solve_top_k(**problem, k=1)


@pytest.mark.parametrize(("argument", "place", "value", "message"), SPOILED_VALUES[:-1])
def test_partial_refuses_the_same(exact_solver, problem, argument, place, value, message):
    problem[argument][place] = value
    with pytest.raises(ValueError, match=message):
        solve(**problem, solver=exact_solver, partial=True)


def test_a_single_problem_has_no_index(exact_solver):
    with pytest.raises(ValueError, match=r"got nan at \[0, 1\] of \[N, M\] = \[1, 2\]$"):
        solve(
            torch.tensor([[0.0, math.nan]]),
            torch.tensor([1.0]),
            torch.tensor([0.5, 0.5]),
            solver=exact_solver,
        )


def test_first_bad_problem_is_the_one_named(exact_solver, problem):
    problem["cost"][0, 2, 1, 1] = math.nan
    problem["supply"][1, 2, 0] = -1
    with pytest.raises(ValueError, match=r"cost: .*problem \[0, 2\]"):
        solve(**problem, solver=exact_solver)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cost": torch.rand(5)}, ValueError, r"cost: expected shape \[..., N, M\], got \[5\]"),
        (
            {"supply": torch.ones(2, 3, 6)},
            ValueError,
            r"supply: expected shape \[..., N\], with N = 4, got \[2, 3, 6\]",
        ),
        (
            {"demand": torch.ones(2, 3, 4)},
            ValueError,
            r"demand: expected shape \[..., M\], with M = 5, got \[2, 3, 4\]",
        ),
        (
            {"supply": torch.ones(3, 4)},
            ValueError,
            r"supply: expected cost's leading dimensions \[2, 3\], got shape \[3, 4\]",
        ),
        (
            {"demand": torch.ones(6, 5)},
            ValueError,
            r"demand: expected cost's leading dimensions \[2, 3\], got shape \[6, 5\]",
        ),
        (
            {"cost": torch.rand(2, 3, 0, 5), "supply": torch.rand(2, 3, 0)},
            ValueError,
            r"cost: expected at least one supplier and one demander, got shape \[2, 3, 0, 5\]",
        ),
        (
            {"demand": torch.empty(2, 3, 5, device="meta")},
            ValueError,
            "demand: expected cost's device cpu, got a tensor on meta",
        ),
        (
            {"cost": torch.ones(2, 3, 4, 5, dtype=torch.int64)},
            TypeError,
            "cost: expected a floating-point tensor, got dtype torch.int64",
        ),
        (
            {"supply": torch.ones(2, 3, 4, dtype=torch.int32)},
            TypeError,
            "supply: expected a floating-point tensor, got dtype torch.int32",
        ),
        ({"demand": [0.2] * 5}, TypeError, "demand: expected a torch.Tensor, got list"),
    ],
)
@pytest.mark.parametrize("function", [solve, emd, lower_bound])
def test_bad_argument_is_named(function, problem, changes, error, message):
    with pytest.raises(error, match=message):
        function(**{**problem, **changes})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_to_float32(exact_solver, problem, dtype):
    half = {name: part.to(dtype) for name, part in problem.items()}
    plan = solve(**{**problem, "cost": half["cost"]}, solver=exact_solver)
    assert plan.value.dtype == torch.float32
    expected = solve(**{**problem, "cost": half["cost"].float()}, solver=exact_solver)
    assert torch.equal(plan.value, expected.value)


def test_mixed_precision_takes_the_wider(exact_solver, problem):
    plan = solve(**{**problem, "cost": problem["cost"].double()}, solver=exact_solver)
    assert plan.flow.dtype == plan.supply_potential.dtype == torch.float64
