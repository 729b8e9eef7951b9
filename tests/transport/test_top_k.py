"""The pruned search returns exactly what solving every candidate and sorting would."""

from __future__ import annotations

import pytest
import torch

from emd_retrieval.transport import solve, solve_top_k


@pytest.fixture
def search(make_problem):
    """``[Q, C, ..]`` problems: candidates at many distances, of unequal mass."""

    def make(queries, candidates, N, M, *, seed=0, **kwargs):
        cost, supply, demand = make_problem(N, M, batch=queries * candidates, seed=seed, **kwargs)
        generator = torch.Generator().manual_seed(seed)
        shape = (queries, candidates)
        offset = torch.rand(queries * candidates, 1, 1, generator=generator)
        mass = 0.5 + torch.rand(queries * candidates, 1, generator=generator)
        return (
            (cost + offset.to(cost.dtype)).reshape(*shape, N, M),
            (supply * mass).to(cost.dtype).reshape(*shape, N),
            (demand * mass).to(cost.dtype).reshape(*shape, M),
        )

    return make


def solve_and_sort(problem, k, solver):
    value = solve(*problem, solver=solver).value
    mass = problem[1].sum(-1, dtype=torch.float64).to(value.dtype)
    distance, index = (value / mass).sort(dim=-1, stable=True)
    return distance[..., :k], index[..., :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 20, 40])
@pytest.mark.parametrize(("N", "M"), [(6, 6), (9, 4)])
def test_equals_full_solving(exact_solver, N, M, k, dtype, search):
    problem = search(4, 40, N, M, dtype=dtype, seed=k)
    nearest = solve_top_k(*problem, k, solver=exact_solver)
    distance, index = solve_and_sort(problem, k, exact_solver)
    assert torch.equal(nearest.index, index)
    if dtype == torch.float32:
        assert torch.equal(nearest.distance, distance)
    else:  # torch's sum of the mass may round otherwise than the native core's
        torch.testing.assert_close(nearest.distance, distance, rtol=1e-15, atol=0)
    assert nearest.distance.dtype == dtype
    assert nearest.index.dtype == nearest.solved.dtype == torch.int64


@pytest.mark.parametrize("cost", ["quantised", "zero", "negative", "huge"])
@pytest.mark.parametrize("weights", ["equal", "zeros", "one_hot"])
def test_equals_full_solving_of_every_kind(exact_solver, cost, weights, search):
    problem = search(3, 30, 7, 7, cost=cost, weights=weights)
    nearest = solve_top_k(*problem, 5, solver=exact_solver)
    distance, index = solve_and_sort(problem, 5, exact_solver)
    assert torch.equal(nearest.index, index)
    assert torch.equal(nearest.distance, distance)


def test_equal_distances_are_ordered_by_index(exact_solver, search):
    problem = search(2, 10, 5, 5)
    copies = torch.tensor([3, 7, 3, 3, 1, 7, 3, 0, 1, 3])
    problem = tuple(part[:, copies] for part in problem)
    nearest = solve_top_k(*problem, 6, solver=exact_solver)
    distance, index = solve_and_sort(problem, 6, exact_solver)
    assert torch.equal(nearest.index, index)
    assert torch.equal(nearest.distance, distance)
    for row in nearest.index.tolist():
        places = {}
        for candidate in row:
            places.setdefault(int(copies[candidate]), []).append(candidate)
        assert all(found == sorted(found) for found in places.values())


def test_most_problems_stay_unsolved(exact_solver, search):
    problem = search(5, 100, 8, 8)
    nearest = solve_top_k(*problem, 2, solver=exact_solver)
    assert (nearest.solved >= 2).all()
    assert nearest.solved.double().mean() < 40


def test_leading_dimensions(exact_solver, search):
    cost, supply, demand = search(6, 9, 4, 5)
    flat = solve_top_k(cost, supply, demand, 3, solver=exact_solver)
    shaped = solve_top_k(
        cost.reshape(2, 3, 9, 4, 5),
        supply.reshape(2, 3, 9, 4),
        demand.reshape(2, 3, 9, 5),
        3,
        solver=exact_solver,
    )
    assert torch.equal(shaped.index, flat.index.reshape(2, 3, 3))
    assert torch.equal(shaped.distance, flat.distance.reshape(2, 3, 3))
    assert torch.equal(shaped.solved, flat.solved.reshape(2, 3))
    alone = solve_top_k(cost[2], supply[2], demand[2], 3, solver=exact_solver)
    assert torch.equal(alone.index, flat.index[2])
    assert alone.solved.shape == ()


def test_sizes_above_the_native_one(exact_solver, search):
    problem = search(1, 12, 66, 3)
    nearest = solve_top_k(*problem, 4, solver=exact_solver)
    assert torch.equal(nearest.index, solve_and_sort(problem, 4, exact_solver)[1])


def test_no_queries(exact_solver):
    nearest = solve_top_k(
        torch.empty(0, 5, 3, 4), torch.empty(0, 5, 3), torch.empty(0, 5, 4), 2, solver=exact_solver
    )
    assert nearest.distance.shape == nearest.index.shape == (0, 2)
    assert nearest.solved.shape == (0,)


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_out_of_range(k, search):
    with pytest.raises(ValueError, match=f"k: expected 1 to 9, the number of candidates, got {k}"):
        solve_top_k(*search(2, 9, 3, 3), k)


def test_inexact_solvers_are_refused(search):
    with pytest.raises(ValueError, match="solver: expected one of simplex, pot; got 'sinkhorn'"):
        solve_top_k(*search(2, 9, 3, 3), 2, solver="sinkhorn")


def test_a_query_needs_candidates():
    with pytest.raises(ValueError, match=r"cost: expected shape \[..., C, N, M\], got \[3, 4\]"):
        solve_top_k(torch.rand(3, 4), torch.ones(3), torch.ones(4), 1)
