"""Sinkhorn: the entropic optimum, its error bound, the implicit gradient, empty nodes."""

from __future__ import annotations

from typing import Any

import ot
import pytest
import torch
from torch import Tensor

from emd_retrieval.transport.sinkhorn import solve_sinkhorn

Problem = tuple[Tensor, Tensor, Tensor]

CONVERGED: dict[str, Any] = {"iterations": 20_000, "tolerance": 1e-13}
SHAPES = [(1, 1), (1, 5), (6, 1), (5, 5), (4, 7), (12, 9)]


def problem(B: int, N: int, M: int, seed: int = 0, mass: float = 3.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(B, N, M, generator=generator, dtype=torch.float64)
    supply, demand = (
        0.2 + torch.rand(B, K, generator=generator, dtype=torch.float64) for K in (N, M)
    )
    return (
        cost,
        mass * supply / supply.sum(1, keepdim=True),
        mass * demand / demand.sum(1, keepdim=True),
    )


def with_gradients(inputs: Problem) -> Problem:
    cost, supply, demand = (x.detach().clone().requires_grad_() for x in inputs)
    return cost, supply, demand


def exact_value(cost: Tensor, supply: Tensor, demand: Tensor) -> float:
    mass = supply.sum()
    value = ot.emd2((supply / mass).numpy(), (demand / mass).numpy(), cost.numpy())
    return float(value) * float(mass)


@pytest.mark.parametrize(("N", "M"), SHAPES)
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_agrees_with_pot_and_has_the_stated_form(N: int, M: int, epsilon: float) -> None:
    cost, supply, demand = problem(3, N, M)
    plan = solve_sinkhorn(cost, supply, demand, epsilon=epsilon, **CONVERGED)
    assert plan.flow is not None
    assert plan.supply_potential is not None
    assert plan.demand_potential is not None
    torch.testing.assert_close(plan.flow.sum(2), supply, rtol=0, atol=1e-9)
    torch.testing.assert_close(plan.flow.sum(1), demand, rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.value, (cost * plan.flow).sum((1, 2)))
    for i in range(3):
        reference = ot.sinkhorn(
            (supply[i] / 3).numpy(),
            (demand[i] / 3).numpy(),
            cost[i].numpy(),
            epsilon,
            method="sinkhorn_log",
            numItermax=5000,
            stopThr=1e-12,
        )
        torch.testing.assert_close(plan.flow[i], 3 * torch.from_numpy(reference), rtol=0, atol=1e-9)
    potentials = plan.supply_potential[:, :, None] + plan.demand_potential[:, None, :]
    product = supply[:, :, None] * demand[:, None, :] / 3
    torch.testing.assert_close(plan.flow, product * ((potentials - cost) / epsilon).exp())
    assert plan.supply_potential.mean(1).abs().max() < 1e-12


def test_error_keeps_its_bound_and_goes_to_zero() -> None:
    cost, supply, demand = problem(6, 8, 5, seed=1)
    exact = torch.tensor([exact_value(*(x[i] for x in (cost, supply, demand))) for i in range(6)])
    entropies = [-(share * share.log()).sum(1) for share in (supply / 3, demand / 3)]
    last = torch.inf
    for epsilon in (1.0, 0.1, 0.01):
        value = solve_sinkhorn(cost, supply, demand, epsilon=epsilon, **CONVERGED).value
        error = value - exact
        assert error.min() > -1e-6
        assert (error <= 3 * epsilon * torch.minimum(*entropies)).all()
        assert error.max() < last
        last = float(error.max())
    assert last < 0.01


def test_truncated_iterations_meet_the_demand() -> None:
    cost, supply, demand = problem(2, 6, 7)
    plan = solve_sinkhorn(cost, supply, demand, epsilon=0.01, iterations=3)
    assert plan.flow is not None
    torch.testing.assert_close(plan.flow.sum(1), demand)
    assert (plan.flow.sum(2) - supply).abs().max() > 1e-3


@pytest.mark.parametrize(("N", "M"), [(4, 4), (3, 5), (5, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("epsilon", [0.5, 0.1])
def test_gradients_are_those_of_the_converged_value_and_flow(
    N: int, M: int, epsilon: float
) -> None:
    cost, supply, demand = problem(2, N, M, seed=3)

    def from_logits(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        plan = solve_sinkhorn(
            cost, 3 * supply.softmax(1), 3 * demand.softmax(1), epsilon=epsilon, **CONVERGED
        )
        assert plan.flow is not None
        return plan.value, plan.flow

    inputs = with_gradients((cost, supply, demand))
    assert torch.autograd.gradcheck(from_logits, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_empty_nodes_are_as_if_absent() -> None:
    cost, supply, demand = problem(3, 6, 5, seed=7)
    supply[:, [1, 4]] = 0
    demand[:, 2] = 0
    demand *= supply.sum(1, keepdim=True) / demand.sum(1, keepdim=True)
    rows, columns = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 3, 4])
    inputs = with_gradients((cost, supply, demand))
    smaller = with_gradients((cost[:, rows][:, :, columns], supply[:, rows], demand[:, columns]))
    plan = solve_sinkhorn(*inputs, epsilon=0.1, **CONVERGED)
    reference = solve_sinkhorn(*smaller, epsilon=0.1, **CONVERGED)
    assert plan.flow is not None
    assert reference.flow is not None
    torch.testing.assert_close(plan.value, reference.value)
    torch.testing.assert_close(plan.flow[:, rows][:, :, columns], reference.flow)
    assert plan.flow[:, [1, 4]].abs().max() == 0
    assert plan.flow[:, :, 2].abs().max() == 0
    for potential in (plan.supply_potential, plan.demand_potential):
        assert potential is not None
        assert torch.isfinite(potential).all()
    ours = torch.autograd.grad(plan.flow.square().sum() + plan.value.sum(), inputs)
    theirs = torch.autograd.grad(reference.flow.square().sum() + reference.value.sum(), smaller)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in ours)
    torch.testing.assert_close(ours[0][:, rows][:, :, columns], theirs[0])
    shift = (ours[1][:, rows] - theirs[1]).mean(1, keepdim=True)
    torch.testing.assert_close(ours[1][:, rows] - shift, theirs[1])
    torch.testing.assert_close(ours[2][:, columns] + shift, theirs[2])


@pytest.mark.parametrize("side", ["supply", "demand"])
def test_gradient_at_an_empty_node_is_the_one_sided_derivative(side: str) -> None:
    cost, supply, demand = problem(3, 4, 5, seed=13)
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    changed = supply if side == "supply" else demand
    changed[:, 1] += changed[:, 2]
    changed[:, 2] = 0

    def objectives(step: float) -> tuple[Tensor, Tensor, Problem]:
        moved = changed.clone()
        moved[:, 2] += step
        moved[:, 0] -= step
        inputs = (cost, moved, demand) if side == "supply" else (cost, supply, moved)
        inputs = with_gradients(inputs)
        plan = solve_sinkhorn(*inputs, epsilon=0.2, **CONVERGED)
        assert plan.flow is not None
        return plan.value, (weights * plan.flow).sum((1, 2)), inputs

    step = 1e-7
    *here, inputs = objectives(0.0)
    *there, _ = objectives(step)
    for before, after in zip(here, there, strict=True):
        gradient = torch.autograd.grad(
            before.sum(), inputs[1 if side == "supply" else 2], retain_graph=True
        )[0]
        slope = (after - before).detach() / step
        torch.testing.assert_close(gradient[:, 2] - gradient[:, 0], slope, rtol=1e-5, atol=1e-5)


def test_tolerance_stops_early_and_keeps_its_word() -> None:
    inputs = problem(4, 6, 6)
    supply = inputs[1]
    for tolerance in (0.02, 1e-4):
        flow = solve_sinkhorn(*inputs, iterations=1000, tolerance=tolerance).flow
        assert flow is not None
        misplaced = 0.5 * (flow.sum(2) - supply).abs().sum(1) / 3
        assert 1e-3 * tolerance < misplaced.max() <= tolerance
    first_look = solve_sinkhorn(*inputs, iterations=1000, tolerance=1.0)
    torch.testing.assert_close(first_look.flow, solve_sinkhorn(*inputs, iterations=10).flow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharp_problems_stay_finite(dtype: torch.dtype) -> None:
    cost, supply, demand = (x.to(dtype) for x in problem(4, 9, 9))
    supply, demand = torch.full_like(supply, 1 / 3), torch.full_like(demand, 1 / 3)
    inputs = with_gradients((1000 * cost - 500, supply, demand))
    plan = solve_sinkhorn(*inputs, epsilon=1e-3)
    assert plan.flow is not None
    gradients = torch.autograd.grad(plan.value.sum() + plan.flow.square().sum(), inputs)
    for part in (plan.value, plan.flow, plan.supply_potential, plan.demand_potential, *gradients):
        assert part is not None
        assert part.dtype == dtype
        assert torch.isfinite(part).all()


def test_parts_on_request_and_nothing_but_the_plan_in_the_graph() -> None:
    inputs = with_gradients(problem(2, 4, 3))
    plan = solve_sinkhorn(*inputs, need_flow=False, need_potentials=False)
    assert plan.flow is None
    assert plan.supply_potential is None
    assert plan.demand_potential is None
    graph = plan.value.grad_fn
    assert graph is not None
    assert all("AccumulateGrad" in type(node).__name__ for node, _ in graph.next_functions if node)
    full = solve_sinkhorn(*inputs)
    assert full.supply_potential is not None
    assert not full.supply_potential.requires_grad


def test_empty_batch() -> None:
    cost, supply, demand = (x[:0] for x in problem(1, 4, 3))
    inputs = with_gradients((cost, supply, demand))
    plan = solve_sinkhorn(*inputs, tolerance=0.1)
    assert plan.flow is not None
    assert plan.flow.shape == (0, 4, 3)
    (plan.value.sum() + plan.flow.sum()).backward()
    assert inputs[0].grad is not None


def test_second_derivatives_are_refused() -> None:
    inputs = with_gradients(problem(2, 3, 3))
    value = solve_sinkhorn(*inputs).value.sum()
    with pytest.raises(RuntimeError, match="solve_sinkhorn: the backward pass cannot itself"):
        torch.autograd.grad(value, inputs, create_graph=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon: expected a positive number, got 0.0"),
        ({"epsilon": float("inf")}, "epsilon: expected a positive number, got inf"),
        ({"iterations": 0}, "iterations: expected a positive number, got 0"),
        ({"tolerance": -1.0}, "tolerance: expected zero or more, got -1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_sinkhorn(*problem(1, 2, 2), **options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_agrees_with_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        cost, supply, demand = (x.to(device) for x in problem(64, 25, 14))
        inputs = with_gradients((cost, supply, demand))
        plan = solve_sinkhorn(*inputs)
        gradients = torch.autograd.grad(plan.value.sum(), inputs)
        results.append((plan.value, plan.flow, *gradients))
    for cpu, cuda in zip(*results, strict=True):
        assert cuda is not None
        assert cuda.is_cuda
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-7, atol=1e-7)
