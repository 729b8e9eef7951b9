"""The dual reduction bound: below the value, close to it, and what its definition says."""

from __future__ import annotations

import pytest
import torch

from emd_retrieval.transport import lower_bound, solve
from emd_retrieval.transport.bounds import _lower_bound


@pytest.fixture(params=["native", "torch"])
def bound(request):
    """The native core's bound, and torch's, which serves other devices and larger problems."""
    return lower_bound if request.param == "native" else _lower_bound


def test_never_above_the_value(bound, every_kind, unit):
    for name, problem, value in every_kind:
        excess = ((bound(*problem) - value) / unit(*problem)).max()
        assert excess <= 1e-6, f"{name}: {excess:.2g}"


def reduction(cost, supply, demand):
    """The definition, node by node."""
    N, M = cost.shape
    u = [min(cost[i, j] for j in range(M)) for i in range(N)]
    v = [min(cost[i, j] - u[i] for i in range(N)) for j in range(M)]
    return sum(supply[i] * u[i] for i in range(N)) + sum(demand[j] * v[j] for j in range(M))


@pytest.mark.parametrize(("N", "M"), [(1, 1), (3, 5), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_its_definition(bound, N, M, dtype, make_problem):
    problem = make_problem(N, M, batch=4, dtype=dtype, seed=N)
    expected = [
        max(reduction(cost, supply, demand), reduction(cost.T, demand, supply))
        for cost, supply, demand in zip(*problem, strict=True)
    ]
    found = bound(*problem)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("N", "M"), [(1, 6), (6, 1)])
def test_exact_with_one_node_on_a_side(bound, N, M, make_problem):
    problem = make_problem(N, M, batch=4)
    torch.testing.assert_close(bound(*problem), solve(*problem).value)


def test_tight_where_costs_are_structured(bound):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(25, 64, generator=generator)
    noise = torch.randn(2, 20, 25, 64, generator=generator)
    query, reference = torch.nn.functional.normalize(parts + 0.5 * noise, dim=-1)
    cost = 1 - query @ reference.mT
    weights = torch.full((20, 25), 1 / 25)
    ratio = bound(cost, weights, weights) / solve(cost, weights, weights).value
    assert ratio.min() > 0.9


def test_swapping_the_sides_changes_nothing(make_problem):
    cost, supply, demand = make_problem(5, 8, batch=6)
    torch.testing.assert_close(
        lower_bound(cost, supply, demand), lower_bound(cost.mT, demand, supply)
    )


def test_leading_dimensions_and_strides(make_problem):
    cost, supply, demand = make_problem(4, 7, batch=6)
    expected = lower_bound(cost, supply, demand)
    shaped = lower_bound(
        cost.mT.contiguous().mT.reshape(2, 3, 4, 7), supply.reshape(2, 3, 4), demand.view(2, 3, 7)
    )
    assert torch.equal(shaped, expected.reshape(2, 3))
    alone = lower_bound(cost[1], supply[1], demand[1])
    torch.testing.assert_close(alone, expected[1])


def test_has_no_gradient(make_problem):
    cost, supply, demand = make_problem(4, 7)
    assert not lower_bound(cost.requires_grad_(), supply.requires_grad_(), demand).requires_grad


def test_sizes_above_the_native_one(make_problem):
    problem = make_problem(66, 5)
    assert (lower_bound(*problem) <= solve(*problem).value + 1e-6).all()
    torch.testing.assert_close(lower_bound(*problem), _lower_bound(*problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_solving_refuses_is_refused(bound, dtype):
    large = torch.finfo(dtype).max / 16
    cost = torch.tensor([[[-large, large], [large, -large]]], dtype=dtype)
    supply, demand = torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]], dtype=dtype)
    assert bound(cost, supply, demand).item() == pytest.approx(-large, rel=1e-6)
    with pytest.raises(ValueError, match="cost: expected costs of at most"):
        bound(4 * cost, supply, demand)
    with pytest.raises(
        ValueError, match="cost, supply: expected costs whose product with the mass"
    ):
        bound(cost, 20 * supply, 20 * demand)


def test_empty_batch():
    found = lower_bound(torch.empty(2, 0, 3, 4), torch.empty(2, 0, 3), torch.empty(2, 0, 4))
    assert found.shape == (2, 0)
