"""Unequal totals: Rubner's EMD for every solver, whichever side is the lighter one."""

from __future__ import annotations

import pytest
import torch

from emd_retrieval.transport import emd, solve

MARGINALS = {"simplex": 1e-6, "pot": 1e-6, "opencv": 1e-4, "sinkhorn": 3e-2, "qp": 1e-6}
VALUES = {"simplex": 1e-6, "pot": 1e-6, "opencv": 5e-5, "sinkhorn": 1e-1, "qp": 1e-4}
# Lighter demand, lighter supply, equal totals, and almost nothing on one side.
SUPPLY_SHARES = (2.0, 0.4, 1.0, 1e-3)


@pytest.fixture
def unequal(make_problem):
    """One problem of each share in one batch."""

    def make(N, M, **kwargs):
        cost, supply, demand = make_problem(N, M, batch=len(SUPPLY_SHARES), **kwargs)
        return cost, supply * torch.tensor(SUPPLY_SHARES, dtype=cost.dtype)[:, None], demand

    return make


@pytest.mark.parametrize(("N", "M"), [(5, 8), (6, 3), (1, 4), (1, 1)])
def test_lighter_side_moves_everything(solver, N, M, unequal, oracle):
    cost, supply, demand = unequal(N, M, seed=N)
    plan = solve(cost, supply, demand, solver=solver, partial=True)
    moved = torch.minimum(supply.sum(-1), demand.sum(-1))
    tolerance = MARGINALS[solver]
    assert plan.flow.shape == cost.shape
    assert (plan.flow >= 0).all()
    assert (plan.flow.sum(-1) <= supply + tolerance).all()
    assert (plan.flow.sum(-2) <= demand + tolerance).all()
    torch.testing.assert_close(plan.flow.sum((-2, -1)), moved, rtol=0, atol=2 * tolerance)
    expected = oracle(cost, supply, demand, partial=True)
    torch.testing.assert_close(plan.value.double(), expected, rtol=0, atol=2 * VALUES[solver])


@pytest.mark.parametrize("kind", ["cosine", "negative", "quantised", "huge", "tiny"])
@pytest.mark.parametrize("weights", ["relu", "equal", "zeros", "one_hot"])
def test_every_kind_of_problem(exact_solver, kind, weights, unequal, oracle, unit):
    problem = unequal(7, 5, cost=kind, weights=weights)
    plan = solve(*problem, solver=exact_solver, partial=True)
    error = (plan.value.double() - oracle(*problem, partial=True)).abs() / unit(*problem)
    assert (error <= 2e-6).all()


def test_potentials_certify_the_flow(exact_solver, unequal):
    cost, supply, demand = unequal(7, 5)
    plan = solve(cost, supply, demand, solver=exact_solver, partial=True)
    u, v = plan.supply_potential, plan.demand_potential
    reduced = cost - u[:, :, None] - v[:, None, :]
    assert (reduced >= -2e-6).all()
    assert ((plan.flow * reduced).sum((-2, -1)).abs() <= 2e-6).all()
    dual = (supply * u).sum(-1) + (demand * v).sum(-1)
    torch.testing.assert_close(dual, plan.value, rtol=0, atol=4e-6)
    # The heavier side: a node that keeps mass has the potential zero, no node has one above it.
    left = supply[0] - plan.flow[0].sum(-1)
    assert (u[0] <= 1e-6).all()
    assert u[0, left > 1e-5].abs().max() <= 1e-6
    left = demand[1] - plan.flow[1].sum(-2)
    assert (v[1] <= 1e-6).all()
    assert v[1, left > 1e-5].abs().max() <= 1e-6


def test_equal_totals_are_the_balanced_problem(exact_solver, make_problem, certify):
    problem = make_problem(6, 4, weights="integer")
    cost, supply, demand = problem[0], torch.full((3, 6), 0.5), torch.full((3, 4), 0.75)
    partial = solve(cost, supply, demand, solver=exact_solver, partial=True)
    torch.testing.assert_close(
        partial.value, solve(cost, supply, demand, solver=exact_solver).value
    )
    certify((cost, supply, demand), partial)


def test_gradient_is_that_of_finite_differences(exact_solver, make_problem):
    cost, supply, demand = make_problem(
        4, 5, batch=2, weights="generic", dtype=torch.float64, seed=3
    )
    share = torch.tensor([1.7, 0.6], dtype=torch.float64)[:, None]
    inputs = (
        cost.requires_grad_(),
        (supply * share).requires_grad_(),
        demand.clone().requires_grad_(),
    )
    # No normalisation here: with unequal totals every direction is allowed.
    assert torch.autograd.gradcheck(
        lambda *parts: emd(*parts, solver=exact_solver, partial=True),
        inputs,
        eps=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["sinkhorn", "qp"])
def test_torch_solvers_are_differentiable(name, unequal):
    inputs = tuple(part.requires_grad_() for part in unequal(4, 5, dtype=torch.float64))
    gradients = torch.autograd.grad(emd(*inputs, solver=name, partial=True).sum(), inputs)
    for gradient, part in zip(gradients, inputs, strict=True):
        assert gradient.shape == part.shape
        assert gradient.isfinite().all()
        assert gradient.count_nonzero() > 0


def test_largest_native_size(exact_solver, unequal, oracle):
    # The added node makes 65 of 64, which the native simplex hands on.
    problem = unequal(64, 63)
    value = solve(*problem, solver=exact_solver, partial=True).value
    torch.testing.assert_close(value.double(), oracle(*problem, partial=True), rtol=0, atol=2e-6)


def test_unequal_totals_need_to_be_asked_for(solver, unequal):
    with pytest.raises(ValueError, match=r"partial=True.*problem \[0\] of leading shape \[4\]"):
        solve(*unequal(3, 4), solver=solver)
