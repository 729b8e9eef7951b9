"""The interior point: optimality, the implicit gradient, degenerate supports, hostile scales.

References: the KKT conditions themselves, the whole KKT system solved densely, finite differences,
HiGHS, exact rational arithmetic, and a general QP layer (qpth) where it is installed.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from emd_retrieval.transport import qp
from emd_retrieval.transport.newton import NewtonSystem
from emd_retrieval.transport.qp import DEFAULT_STRENGTH, Form, solve_qp

FORMS = ["l2", "qp"]
SHAPES = [(1, 1), (1, 6), (7, 1), (5, 5), (4, 9), (12, 7)]
KINDS = [
    "relu",
    "equal",
    "integer",
    "one-hot",
    "zeros",
    "lognormal",
    "constant cost",
    "zero cost",
    "quantised cost",
    "duplicated nodes",
    "large scale",
    "small scale",
]

Problem = tuple[Tensor, Tensor, Tensor]


def features(B: int, N: int, D: int, generator: torch.Generator) -> Tensor:
    """Nodes that share a few parts, plus noise."""
    parts = torch.randn(B, 6, D, generator=generator, dtype=torch.float64)
    choice = torch.randint(0, 6, (B, N, 1), generator=generator).expand(-1, -1, D)
    noise = torch.randn(B, N, D, generator=generator, dtype=torch.float64)
    return parts.gather(1, choice) + 0.7 * noise + 0.4


def problem(kind: str, B: int, N: int, M: int, seed: int = 0) -> Problem:
    """Problems of total mass max(N, M), cosine costs, and weights or costs of some kind."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    query, reference = features(B, N, 16, generator), features(B, M, 16, generator)
    cost = 1 - torch.cosine_similarity(query[:, :, None], reference[:, None, :], dim=-1)
    supply = (query * reference.mean(1, keepdim=True)).sum(2).relu() + 1e-3
    demand = (reference * query.mean(1, keepdim=True)).sum(2).relu() + 1e-3
    if kind == "generic":
        supply, demand = (0.2 + uniform(B, K) for K in (N, M))
    elif kind in ("equal", "duplicated nodes"):
        supply, demand = torch.ones_like(supply), torch.ones_like(demand)
    elif kind == "integer":
        supply, demand = (1 + (4 * uniform(B, K)).floor() for K in (N, M))
    elif kind == "one-hot":
        supply, demand = (torch.full_like(weights, 1e-6) for weights in (supply, demand))
        supply[:, 0] = demand[:, -1] = 1.0
    elif kind == "zeros":
        supply, demand = (uniform(B, K) * (uniform(B, K) > 0.4) for K in (N, M))
        supply[:, -1] += 0.1
        demand[:, 0] += 0.1
    elif kind == "lognormal":
        supply, demand = ((8 * uniform(B, K) - 4).exp() for K in (N, M))
    elif kind == "constant cost":
        cost = torch.full_like(cost, 0.3)
    elif kind == "zero cost":
        cost = torch.zeros_like(cost)
    elif kind == "quantised cost":
        cost = (4 * cost).round() / 4
    if kind == "duplicated nodes":
        cost = cost[:, [i // 2 * 2 for i in range(N)]]
    scale = {"large scale": 1e6, "small scale": 1e-6}.get(kind, 1.0)
    mass = max(N, M) / scale
    supply, demand = (
        weights * (mass / weights.sum(1, keepdim=True)) for weights in (supply, demand)
    )
    return scale * cost, supply, demand


def centred_gradients(objective: Tensor, inputs: Problem) -> Problem:
    grad_cost, grad_supply, grad_demand = torch.autograd.grad(objective, inputs, retain_graph=True)
    mean = grad_supply.mean(1, keepdim=True)
    return grad_cost, grad_supply - mean, grad_demand + mean


def with_gradients(inputs: Problem) -> Problem:
    cost, supply, demand = (x.detach().clone().requires_grad_() for x in inputs)
    return cost, supply, demand


def exact(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """Value, flow and centred duals of one linear problem, by HiGHS."""
    N, M = cost.shape
    demand = demand * supply.sum() / demand.sum()
    solution = linprog(
        cost.flatten().numpy(),
        A_eq=marginals(N, M).numpy(),
        b_eq=torch.cat([supply, demand]).numpy(),
        method="highs",
    )
    assert solution.success
    duals = torch.from_numpy(solution.eqlin.marginals)
    mean = duals[:N].mean()
    flow = torch.from_numpy(solution.x).reshape(N, M)
    return solution.fun, flow, duals[:N] - mean, duals[N:] + mean


def marginals(N: int, M: int) -> Tensor:
    """The matrix A of Equation 5: ``[N + M, N * M]``."""
    one = torch.ones(1, dtype=torch.float64)
    eye_n, eye_m = torch.eye(N, dtype=torch.float64), torch.eye(M, dtype=torch.float64)
    return torch.cat([torch.kron(eye_n, one.expand(1, M)), torch.kron(one.expand(1, N), eye_m)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "M"), SHAPES)
def test_solution_satisfies_the_kkt_conditions(form: str, kind: str, N: int, M: int) -> None:
    cost, supply, demand = problem(kind, 4, N, M)
    plan = solve_qp(cost, supply, demand, form=form)
    assert plan.flow is not None
    assert plan.supply_potential is not None
    assert plan.demand_potential is not None
    mass = supply.sum(1)[:, None]
    assert plan.flow.amin() >= 0
    torch.testing.assert_close(plan.flow.sum(2) / mass, supply / mass, rtol=0, atol=2e-12)
    torch.testing.assert_close(plan.flow.sum(1) / mass, demand / mass, rtol=0, atol=2e-12)
    torch.testing.assert_close(plan.value, (cost * plan.flow).sum((1, 2)))
    size = plan.supply_potential.abs().amax(1) + plan.demand_potential.abs().amax(1)
    assert (plan.supply_potential.mean(1).abs() <= 1e-14 * size).all()

    potentials = plan.supply_potential[:, :, None] + plan.demand_potential[:, None, :]
    if form == "l2":
        slack = cost + 1e-6 * plan.flow - potentials
        unit = cost.abs() + 1e-6 * plan.flow
    else:
        value = plan.value[:, None, None]
        slack = value * (cost - potentials) + 1e-4 * plan.flow
        unit = value * cost.abs() + 1e-4 * plan.flow
        # Potentials are given per value; where that vanishes, they and the condition do.
        slack = torch.where(value > 1e-9 * mass[:, :, None], slack, 0.0)
    slack = slack / unit.amax((1, 2), keepdim=True)
    assert slack.amin() >= -1e-9
    assert (slack * plan.flow / mass[:, :, None]).abs().amax() <= 1e-9


def dense_optimum(
    cost: Tensor, supply: Tensor, demand: Tensor, form: str, strength: float
) -> tuple[Tensor, Tensor]:
    """Flow and slack of one problem, by Newton's method on the whole KKT system."""
    N, M = cost.shape
    A, b = marginals(N, M)[1:], torch.cat([supply, demand])[1:]
    c, size = cost.flatten(), N * M
    Q = strength * torch.eye(size, dtype=torch.float64)
    p = c.clone()
    if form == "qp":
        Q, p = Q + c[:, None] * c, torch.zeros_like(c)
    x, z = torch.ones_like(c), torch.ones_like(c)
    y = torch.zeros_like(b)
    zero = torch.zeros(len(b), size, dtype=torch.float64)
    for _ in range(200):
        gap = (x * z).mean()
        residual = torch.cat([Q @ x + p - A.T @ y - z, A @ x - b, x * z - 0.2 * gap])
        if residual.abs().max() < 1e-13:
            break
        kkt = torch.cat(
            [
                torch.cat([Q, -A.T, -torch.eye(size, dtype=torch.float64)], 1),
                torch.cat([A, zero[:, : len(b)], zero], 1),
                torch.cat([z.diag(), zero.T, x.diag()], 1),
            ]
        )
        dx, dy, dz = torch.linalg.solve(kkt, -residual).split([size, len(b), size])
        ratio = torch.cat([-dx / x, -dz / z]).max()
        step = min(1.0, 0.9 / float(ratio)) if ratio > 0 else 1.0
        x, y, z = x + step * dx, y + step * dy, z + step * dz
    return x, z


def dense_gradients(
    cost: Tensor,
    x: Tensor,
    z: Tensor,
    form: str,
    strength: float,
    grad_flow: Tensor,
) -> Problem:
    """Theorem 1 by the letter: the Jacobian of the KKT conditions, dense, on the active set."""
    N, M = cost.shape
    A, c = marginals(N, M)[1:], cost.flatten()
    size, rows = N * M, N + M - 1
    J_p, J_Q = torch.eye(size, dtype=torch.float64), strength * torch.eye(size, dtype=torch.float64)
    if form == "qp":
        # d/dc of (c . x) c
        J_p = (c @ x) * J_p + c[:, None] * x
        J_Q = J_Q + c[:, None] * c
    active = x > z
    J_x = torch.zeros(size + rows + size, size + rows + size, dtype=torch.float64)
    J_x[:size, :size], J_x[:size, size : size + rows] = J_Q, -A.T
    J_x[:size, size + rows :] = -torch.eye(size, dtype=torch.float64)
    J_x[size : size + rows, :size] = A
    J_x[size + rows :, :size] = torch.where(active, 0.0, z).diag()
    J_x[size + rows :, size + rows :] = torch.where(active, x, 0.0).diag()
    J_theta = torch.zeros(size + rows + size, size + N + M, dtype=torch.float64)
    J_theta[:size, :size] = J_p
    J_theta[size : size + rows, size + 1 :] = -torch.eye(rows, dtype=torch.float64)
    jacobian = -torch.linalg.solve(J_x, J_theta)[:size]
    grad = grad_flow.flatten() @ jacobian
    grad_cost, grad_supply, grad_demand = grad.split([size, N, M])
    mean = grad_supply.mean()
    return grad_cost.reshape(N, M), grad_supply - mean, grad_demand + mean


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [1.0, 1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize(("N", "M"), [(3, 3), (5, 4), (2, 6)])
def test_flow_and_gradients_agree_with_the_dense_kkt_system(
    form: str, strength: float, N: int, M: int
) -> None:
    inputs = with_gradients(problem("generic", 3, N, M, seed=N))
    plan = solve_qp(*inputs, form=form, strength=strength)
    assert plan.flow is not None
    weights = torch.randn(3, N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_flow = centred_gradients((weights * plan.flow).sum(), inputs)
    of_value = centred_gradients(plan.value.sum(), inputs)
    for i in range(3):
        cost, supply, demand = (x[i].detach() for x in inputs)
        x, z = dense_optimum(cost, supply, demand, form, strength)
        # Strict complementarity, or the derivative would not exist and nothing be tested.
        assert torch.maximum(x, z).min() > 1e-6
        torch.testing.assert_close(plan.flow[i].detach().flatten(), x, rtol=0, atol=1e-8)
        reference = dense_gradients(cost, x, z, form, strength, weights[i])
        for ours, theirs in zip(of_flow, reference, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-6, atol=1e-6)
        reference = dense_gradients(cost, x, z, form, strength, cost)
        reference = (reference[0] + x.reshape(N, M), *reference[1:])
        for ours, theirs in zip(of_value, reference, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "M"), [(4, 4), (3, 5), (5, 2), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("strength", [1.0, 1e-2])
def test_gradients_agree_with_finite_differences(
    form: Form, N: int, M: int, strength: float
) -> None:
    cost, supply, demand = problem("generic", 2, N, M, seed=5)

    def from_logits(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        plan = solve_qp(
            cost, 3 * supply.softmax(1), 3 * demand.softmax(1), form=form, strength=strength
        )
        assert plan.flow is not None
        return plan.value, plan.flow

    inputs = with_gradients((cost, supply, demand))
    assert torch.autograd.gradcheck(from_logits, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("N", "M"), [(6, 6), (4, 7)])
def test_gradient_tends_to_the_dual_gradient(N: int, M: int) -> None:
    problems = problem("generic", 4, N, M, seed=11)
    mass = problems[1].sum(1)
    errors = []
    for strength in (1e-2, 1e-4, 1e-6, 1e-8):
        inputs = with_gradients(problems)
        plan = solve_qp(*inputs, strength=strength)
        gradients = centred_gradients(plan.value.sum(), inputs)
        error = 0.0
        for i in range(4):
            value, flow, supply_dual, demand_dual = exact(*(x[i].detach() for x in problems))
            # One vertex and one dual: the support is a tree.
            assert int((flow > 1e-6).sum()) == N + M - 1
            error = max(error, abs(plan.value[i].item() - value) / float(mass[i]))
            for ours, theirs in zip(gradients, (flow, supply_dual, demand_dual), strict=True):
                error = max(error, float((ours[i] - theirs).abs().max()))
        errors.append(error)
    assert errors[-1] < 1e-7
    assert errors[1] < 1e-3
    # Below 1e-12 is rounding, whose order differs from one linear algebra library to another.
    assert [max(e, 1e-12) for e in errors] == sorted((max(e, 1e-12) for e in errors), reverse=True)


@pytest.mark.parametrize("kind", ["equal", "integer", "duplicated nodes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_supports_that_fall_apart(kind: str, dtype: torch.dtype) -> None:
    B, N, M = 4, 6, 6
    problems = tuple(x.to(dtype) for x in problem(kind, B, N, M, seed=3))
    inputs = with_gradients(problems)
    plan = solve_qp(*inputs)
    gradients = centred_gradients(plan.value.sum(), inputs)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-6
    generator = torch.Generator().manual_seed(0)
    for i in range(B):
        cost, supply, demand = (x[i].double() for x in problems)
        value, flow, *_ = exact(cost, supply, demand)
        assert plan.value[i].item() == pytest.approx(value, abs=tolerance)
        if kind != "duplicated nodes":
            assert torch.allclose(gradients[0][i].double(), flow, atol=tolerance)
        # A subgradient: the value is convex in the weights, so the tangent stays below it.
        for _ in range(8):
            change = torch.rand(2, N, generator=generator, dtype=torch.float64)
            change = 0.1 * (change - change.mean(1, keepdim=True))
            moved, *_ = exact(cost, supply + change[0], demand + change[1])
            rise = (gradients[1][i] * change[0]).sum() + (gradients[2][i] * change[1]).sum()
            assert value + float(rise) <= moved + tolerance


def test_flow_gradient_of_supports_that_fall_apart_is_finite_and_right_along_costs() -> None:
    cost, supply, demand = problem("integer", 3, 5, 5, seed=2)
    weights = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def along_cost(cost: Tensor) -> Tensor:
        flow = solve_qp(cost, supply, demand, strength=1e-1).flow
        assert flow is not None
        return (weights * flow).sum((1, 2))

    assert torch.autograd.gradcheck(along_cost, cost.clone().requires_grad_(), atol=1e-5)
    inputs = with_gradients((cost, supply, demand))
    plan = solve_qp(*inputs)
    assert plan.flow is not None
    for gradient in torch.autograd.grad((weights * plan.flow).sum(), inputs[1:]):
        assert gradient.abs().max() < 100 * weights.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_empty_nodes_are_as_if_absent(form: Form) -> None:
    cost, supply, demand = problem("generic", 3, 6, 5, seed=7)
    supply[:, [1, 4]] = 0
    demand[:, 2] = 0
    demand *= supply.sum(1, keepdim=True) / demand.sum(1, keepdim=True)
    rows, columns = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 3, 4])
    inputs = with_gradients((cost, supply, demand))
    smaller = with_gradients((cost[:, rows][:, :, columns], supply[:, rows], demand[:, columns]))
    plan = solve_qp(*inputs, form=form, strength=1e-2)
    reference = solve_qp(*smaller, form=form, strength=1e-2)
    assert plan.flow is not None
    assert reference.flow is not None
    torch.testing.assert_close(plan.value, reference.value)
    torch.testing.assert_close(plan.flow[:, rows][:, :, columns], reference.flow)
    assert plan.flow[:, [1, 4]].abs().max() == 0
    assert plan.flow[:, :, 2].abs().max() == 0
    ours = torch.autograd.grad(plan.flow.square().sum(), inputs)
    theirs = torch.autograd.grad(reference.flow.square().sum(), smaller)
    torch.testing.assert_close(ours[0][:, rows][:, :, columns], theirs[0], rtol=1e-6, atol=1e-9)
    shift = (ours[1][:, rows] - theirs[1]).mean(1, keepdim=True)
    torch.testing.assert_close(ours[1][:, rows] - shift, theirs[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours[2][:, columns] + shift, theirs[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["supply", "demand"])
def test_gradient_at_an_empty_node_is_the_one_sided_derivative(form: Form, side: str) -> None:
    cost, supply, demand = problem("generic", 3, 4, 5, seed=13)
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
        plan = solve_qp(*inputs, form=form, strength=1e-2)
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
        torch.testing.assert_close(gradient[:, 2] - gradient[:, 0], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "zeros", "integer"])
def test_batch_equals_loop_in_any_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(kind, 7, 6, 4)
    whole = solve_qp(*inputs)
    monkeypatch.setattr(qp, "_CHUNK_ENTRIES", {"cpu": 3 * 24})
    chunks = solve_qp(*inputs)
    loop = [solve_qp(*(x[i : i + 1] for x in inputs)) for i in range(7)]
    for name in ("value", "flow", "supply_potential", "demand_potential"):
        one_by_one = torch.cat([getattr(plan, name) for plan in loop])
        for other in (getattr(chunks, name), one_by_one):
            torch.testing.assert_close(getattr(whole, name), other, rtol=1e-9, atol=1e-9)


def test_float32_in_float32_out_and_float64_between() -> None:
    exact_inputs = with_gradients(problem("generic", 3, 5, 6))
    cost, supply, demand = exact_inputs
    inputs = with_gradients((cost.float(), supply.float(), demand.float()))
    plan, reference = solve_qp(*inputs), solve_qp(*exact_inputs)
    assert plan.flow is not None
    assert reference.flow is not None
    for name in ("value", "flow", "supply_potential", "demand_potential"):
        ours = getattr(plan, name)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), getattr(reference, name), rtol=1e-5, atol=2e-5)
    objective = plan.value.sum() + plan.flow.square().sum()
    for gradient in torch.autograd.grad(objective, inputs):
        assert gradient.dtype == torch.float32


def test_many_integer_problems_converge() -> None:
    # Weights that nearly balance in parts: what is left over, 1e-8 of the mass in float32, has to
    # cross between the parts through arcs far weaker than rounding. It is what a regularised
    # factorisation fails on.
    for seed in range(3):
        cost, supply, demand = (x.float() for x in problem("integer", 64, 25, 25, seed))
        plan = solve_qp(cost, supply, demand, strength=5e-8, max_iterations=40)
        assert plan.flow is not None
        torch.testing.assert_close(plan.flow.sum(2), supply, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "integer", "lognormal", "quantised cost"])
def test_cautious_steps_reach_the_same_optimum(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(kind, 8, 9, 7)
    usual = solve_qp(*inputs, strength=1e-3)
    monkeypatch.setattr(qp, "_FULL_CORRECTIONS", 0)
    cautious = solve_qp(*inputs, strength=1e-3)
    torch.testing.assert_close(cautious.flow, usual.flow, rtol=0, atol=1e-8)
    torch.testing.assert_close(cautious.value, usual.value, rtol=0, atol=1e-9)


def test_parts_on_request_and_gradients_one_by_one() -> None:
    cost, supply, demand = problem("generic", 2, 4, 3)
    plan = solve_qp(cost, supply, demand, need_flow=False, need_potentials=False)
    assert plan.flow is None
    assert plan.supply_potential is None
    assert plan.demand_potential is None
    full = with_gradients((cost, supply, demand))
    reference = torch.autograd.grad(solve_qp(*full).value.sum(), full)
    for i in range(3):
        inputs = [cost, supply, demand]
        inputs[i] = inputs[i].clone().requires_grad_()
        gradient = torch.autograd.grad(solve_qp(*inputs).value.sum(), inputs[i])[0]
        torch.testing.assert_close(gradient, reference[i])
    plan = solve_qp(*full)
    assert plan.supply_potential is not None
    assert not plan.supply_potential.requires_grad


def test_empty_batch() -> None:
    inputs = with_gradients(tuple(x[:0] for x in problem("relu", 1, 4, 3)))
    plan = solve_qp(*inputs)
    assert plan.flow is not None
    assert plan.flow.shape == (0, 4, 3)
    (plan.value.sum() + plan.flow.sum()).backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.shape == (0, 4, 3)


def test_second_derivatives_are_refused() -> None:
    inputs = with_gradients(problem("generic", 2, 3, 3))
    with pytest.raises(RuntimeError, match="solve_qp: the backward pass cannot itself be diff"):
        torch.autograd.grad(solve_qp(*inputs).value.sum(), inputs, create_graph=True)


def test_a_failure_to_converge_names_the_problem() -> None:
    cost, supply, demand = problem("relu", 5, 4, 4)
    with pytest.raises(RuntimeError, match=r"problem 0 of 5 did not converge in 3 Newton steps"):
        solve_qp(cost, supply, demand, max_iterations=3)
    cost[3, 1, 2] = torch.nan
    with pytest.raises(RuntimeError, match=r"problem 3 of 5 did not converge in 100 Newton steps"):
        solve_qp(cost, supply, demand)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "L2"}, "form: expected one of l2, qp; got 'L2'"),
        ({"strength": 0.0}, "strength: expected a positive number, got 0.0"),
        ({"strength": float("nan")}, "strength: expected a positive number, got nan"),
        ({"max_iterations": 0}, "max_iterations: expected a positive number, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_qp(*problem("relu", 1, 2, 2), **options)


def exact_newton_step(
    conductance: list[list[Fraction]], h: list[list[Fraction]]
) -> tuple[list[list[Fraction]], list[Fraction]]:
    """``x = D (h + A' y)`` with ``A x = 0`` and the first potential zero, in rational numbers."""
    N, M = len(h), len(h[0])
    matrix = [[Fraction(0)] * (N + M + 1) for _ in range(N + M)]
    for i in range(N):
        for j in range(M):
            for row, column in ((i, N + j), (N + j, i), (i, i), (N + j, N + j)):
                matrix[row][column] += conductance[i][j]
            matrix[i][-1] -= conductance[i][j] * h[i][j]
            matrix[N + j][-1] -= conductance[i][j] * h[i][j]
    matrix = [row[1:] for row in matrix[1:]]
    for k in range(len(matrix)):
        for other in range(len(matrix)):
            if other != k:
                factor = matrix[other][k] / matrix[k][k]
                matrix[other] = [
                    x - factor * y for x, y in zip(matrix[other], matrix[k], strict=True)
                ]
    y = [Fraction(0)] + [matrix[k][-1] / matrix[k][k] for k in range(len(matrix))]
    flow = [[conductance[i][j] * (h[i][j] + y[i] + y[N + j]) for j in range(M)] for i in range(N)]
    return flow, y


@pytest.mark.parametrize(("N", "M"), [(4, 4), (3, 6), (6, 3), (5, 2)])
@pytest.mark.parametrize("tie", [1e-3, 1e-18])
def test_newton_system_keeps_ties_below_rounding(N: int, M: int, tie: float) -> None:
    generator = torch.Generator().manual_seed(N)
    first = (torch.arange(N) < N // 2)[:, None] == (torch.arange(M) < M // 2)
    strength = 1 + torch.rand(N, M, generator=generator, dtype=torch.float64)
    conductance = torch.where(first, strength, tie * strength)
    h = torch.where(first, 0.0, torch.randn(N, M, generator=generator, dtype=torch.float64))
    flow, rows, columns = NewtonSystem(conductance[None]).solve(h[None], 0.0, 0.0)
    exact_flow, exact_y = exact_newton_step(
        [[Fraction(x) for x in row] for row in conductance.tolist()],
        [[Fraction(x) for x in row] for row in h.tolist()],
    )
    reference = torch.tensor([[float(x) for x in row] for row in exact_flow], dtype=torch.float64)
    potentials = torch.tensor([float(x) for x in exact_y], dtype=torch.float64)
    constant = rows[0, 0]
    assert potentials.abs().max() > 1e-3
    torch.testing.assert_close(rows[0] - constant, potentials[:N], rtol=0, atol=1e-12)
    torch.testing.assert_close(columns[0] + constant, potentials[N:], rtol=0, atol=1e-12)
    # Within a part, potentials as large as one would round flows as small as a tie away.
    assert (flow[0] - reference).abs().max() <= max(1e-12 * tie, 1e-15)
    assert (flow[0] - reference)[~first].abs().max() <= 1e-12 * tie


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kind", "N", "M", "strength"),
    [
        ("generic", 5, 5, 1e-1),
        ("generic", 7, 5, 1e-1),
        ("generic", 4, 6, None),
        ("relu", 5, 5, 1e-2),
        ("equal", 5, 5, 1e-1),
        ("integer", 6, 6, 1e-1),
    ],
)
def test_agrees_with_a_general_qp_layer(
    form: Form, kind: str, N: int, M: int, strength: float | None
) -> None:
    # Its backward pass holds slacks at 1e-8 or above, so these are problems without tiny ones.
    strength = strength or DEFAULT_STRENGTH[form]
    layer = pytest.importorskip("qpth.qp")
    problems = problem(kind, 4, N, M, seed=N + M)
    weights = torch.randn(4, N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def general(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
        c = cost.flatten(1)
        identity = torch.eye(N * M, dtype=torch.float64)
        Q, p = strength * identity.expand(4, -1, -1), c
        if form == "qp":
            Q, p = Q + c[:, :, None] * c[:, None, :], torch.zeros_like(c)
        A, b = marginals(N, M)[:-1], torch.cat([supply, demand], 1)[:, :-1]
        solve = layer.QPFunction(verbose=-1, check_Q_spd=False, maxIter=50)
        flow: Tensor = solve(Q, p, -identity, torch.zeros_like(c[0]), A, b)
        return flow.reshape(4, N, M)

    def own(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
        flow = solve_qp(cost, supply, demand, form=form, strength=strength).flow
        assert flow is not None
        return flow

    results = []
    for solver in (own, general):
        inputs = with_gradients(problems)
        flow = solver(*inputs)
        of_flow = centred_gradients((weights * flow).sum(), inputs)
        of_value = centred_gradients((inputs[0] * flow).sum(), inputs)
        results.append((flow.detach(), *of_flow, *of_value))
    if kind in ("equal", "integer"):
        # Along weights the flow has no derivative where the support falls apart.
        results = [(flow, rest[0], rest[3]) for flow, *rest in results]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["relu", "integer", "zeros"])
def test_cuda_agrees_with_cpu(form: Form, kind: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        cost, supply, demand = (x.to(device) for x in problem(kind, 64, 25, 14))
        inputs = with_gradients((cost, supply, demand))
        plan = solve_qp(*inputs, form=form, strength=1e-3)
        assert plan.flow is not None
        gradient = torch.autograd.grad(plan.value.sum() + plan.flow.square().sum(), inputs[0])
        results.append((plan.value, plan.flow, *gradient))
    for cpu, cuda in zip(*results, strict=True):
        assert cuda.is_cuda
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-6, atol=1e-6)
