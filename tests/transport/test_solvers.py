"""Every solver through the same tests: proof of optimality where exact, the contract for all."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from emd_retrieval.transport import TransportPlan, available_solvers, solve
from emd_retrieval.transport.pot import _certificate
from emd_retrieval.transport.simplex import MAX_NODES
from emd_retrieval.transport.solve import SIMPLEX_NODES, SOLVERS, _choose

# The package's attribute of that name is the function.
solve_module = import_module("emd_retrieval.transport.solve")

# How far a solver's marginals and value may be off, in units of mass and of |cost| x mass. Their
# own tests measure what Sinkhorn's entropy and the interior point's curvature do to a value.
MARGINALS = {"simplex": 1e-6, "pot": 1e-6, "opencv": 1e-4, "sinkhorn": 2e-2, "qp": 1e-6}
VALUES = {"simplex": 1e-6, "pot": 1e-6, "opencv": 2e-5, "sinkhorn": 1e-1, "qp": 1e-4}


def same(left, right, **kwargs):
    torch.testing.assert_close(left, right, **kwargs)


def test_all_solvers_are_available():
    assert available_solvers() == ("simplex", "pot", "opencv", "sinkhorn", "qp")


def test_value_is_that_of_the_linear_programme(exact_solver, every_kind, unit):
    for name, problem, expected in every_kind:
        plan = solve(*problem, solver=exact_solver)
        error = ((plan.value - expected).abs() / unit(*problem)).max()
        assert error <= 1e-6, f"{name}: {error:.2g}"


def test_potentials_certify_the_flow(exact_solver, every_kind, certify):
    for name, problem, _ in every_kind:
        try:
            certify(problem, solve(*problem, solver=exact_solver))
        except AssertionError as error:
            error.add_note(name)
            raise


@pytest.mark.parametrize("name", ["simplex", "pot", "opencv"])
@pytest.mark.parametrize("scale", [1e-60, 1e60, -1e9])
def test_costs_of_any_scale_and_sign(name, scale, make_problem, oracle):
    cost, supply, demand = make_problem(7, 9, dtype=torch.float64)
    plan = solve(cost * scale, supply, demand, solver=name)
    expected = oracle(cost * scale, supply, demand)
    same(plan.value, expected, rtol=0, atol=VALUES[name] * abs(scale))


def test_potentials_do_not_rest_on_guesses_at_empty_nodes(make_problem, certify):
    cost, supply, demand = make_problem(8, 9, weights="zeros", dtype=torch.float64, seed=3)
    plan = solve(cost, supply, demand, solver="pot")
    u, v = plan.supply_potential.clone(), plan.demand_potential.clone()
    assert (supply == 0).any()
    assert (demand == 0).any()
    u[supply == 0], v[demand == 0] = 1e3, -7e3
    u, v = _certificate(cost, u, v, supply > 0, demand > 0)
    centre = u.mean(-1, keepdim=True)
    certify((cost, supply, demand), TransportPlan(plan.value, plan.flow, u - centre, v + centre))


def test_float64_is_solved_in_float64(make_problem, oracle):
    problem = make_problem(9, 12, dtype=torch.float64, seed=5)
    same(solve(*problem, solver="pot").value, oracle(*problem), rtol=0, atol=1e-12)


def test_plan_is_a_plan(solver, make_problem, oracle, unit):
    problem = make_problem(6, 9, batch=5, seed=1)
    cost, supply, demand = problem
    plan = solve(*problem, solver=solver)
    assert (plan.flow >= 0).all()
    same(plan.flow.sum(-1), supply, rtol=0, atol=MARGINALS[solver])
    same(plan.flow.sum(-2), demand, rtol=0, atol=MARGINALS[solver])
    same(plan.value, (plan.flow * cost).sum((-2, -1)), rtol=1e-5, atol=1e-6)
    error = (plan.value.double() - oracle(*problem)) / unit(*problem)
    assert (error.abs() <= VALUES[solver]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (1, 2, 1)])
def test_shapes_and_dtypes(solver, leading, dtype, make_problem):
    count = torch.Size(leading).numel()
    cost, supply, demand = make_problem(5, 7, batch=count, dtype=dtype)
    plan = solve(
        cost.reshape(*leading, 5, 7),
        supply.reshape(*leading, 5),
        demand.reshape(*leading, 7),
        solver=solver,
    )
    flat = solve(cost, supply, demand, solver=solver)
    assert plan.value.shape == leading
    assert plan.flow.shape == (*leading, 5, 7)
    assert plan.value.dtype == plan.flow.dtype == dtype
    same(plan.value.flatten(), flat.value, rtol=0, atol=0)
    same(plan.flow.reshape(count, 5, 7), flat.flow, rtol=0, atol=0)
    if solver == "opencv":
        assert plan.supply_potential is None
        assert plan.demand_potential is None
    else:
        assert plan.supply_potential.shape == (*leading, 5)
        assert plan.demand_potential.shape == (*leading, 7)
        assert plan.supply_potential.dtype == plan.demand_potential.dtype == dtype
        same(plan.supply_potential.reshape(count, 5), flat.supply_potential, rtol=0, atol=0)
        same(plan.demand_potential.reshape(count, 7), flat.demand_potential, rtol=0, atol=0)


def test_batch_equals_loop(solver, make_problem):
    problem = make_problem(8, 5, batch=7, seed=2)
    batched = solve(*problem, solver=solver)
    for k in range(7):
        alone = solve(*(part[k] for part in problem), solver=solver)
        # Batched linear algebra may sum in another order than that of one problem.
        same(batched.value[k], alone.value, rtol=1e-6, atol=1e-7)
        same(batched.flow[k], alone.flow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("leading", [(0,), (3, 0)])
def test_empty_batch(solver, leading):
    plan = solve(
        torch.empty(*leading, 4, 3),
        torch.empty(*leading, 4),
        torch.empty(*leading, 3),
        solver=solver,
    )
    assert plan.value.shape == leading
    assert plan.flow.shape == (*leading, 4, 3)


def test_one_node_a_side(solver):
    plan = solve(torch.tensor([[-2.5]]), torch.tensor([4.0]), torch.tensor([4.0]), solver=solver)
    same(plan.value, torch.tensor(-10.0), rtol=1e-5, atol=0)
    same(plan.flow, torch.tensor([[4.0]]), rtol=1e-5, atol=0)


def test_non_contiguous_tensors(solver, make_problem):
    cost, supply, demand = make_problem(4, 6, batch=5)
    strided = cost.transpose(0, 2).contiguous().transpose(0, 2)
    reversed_twice = supply.flip(-1)[:, torch.arange(3, -1, -1)], demand.T.contiguous().T
    assert not strided.is_contiguous()
    assert not reversed_twice[1].is_contiguous()
    expected = solve(cost, supply, demand, solver=solver)
    same(solve(strided, *reversed_twice, solver=solver).value, expected.value)


def test_what_is_not_needed_is_not_returned(solver, make_problem):
    problem = make_problem(4, 6)
    value_only = solve(*problem, solver=solver, need_flow=False, need_potentials=False)
    assert value_only.flow is None
    assert value_only.supply_potential is None
    assert value_only.demand_potential is None
    same(value_only.value, solve(*problem, solver=solver).value)


def test_inputs_stay_as_they_were(solver, make_problem):
    problem = make_problem(5, 5, weights="zeros")
    copies = [part.clone() for part in problem]
    solve(*problem, solver=solver)
    for part, copy in zip(problem, copies, strict=True):
        assert torch.equal(part, copy)


def test_set_against_itself_costs_nothing(exact_solver):
    features = torch.nn.functional.normalize(
        torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    cost = (1 - features @ features.mT).clamp_min(0)
    cost.diagonal(dim1=-2, dim2=-1).zero_()
    weights = torch.full((3, 9), 1 / 9)
    plan = solve(cost, weights, weights, solver=exact_solver)
    assert torch.equal(plan.value, torch.zeros(3))
    same(plan.flow, torch.eye(9).expand(3, 9, 9) / 9)


@pytest.mark.parametrize("mass", [1e-6, 25.0, 1e6])
def test_value_scales_with_mass(exact_solver, mass, make_problem):
    cost, supply, demand = make_problem(7, 6)
    plan = solve(cost, supply, demand, solver=exact_solver)
    scaled = solve(cost, supply * mass, demand * mass, solver=exact_solver)
    same(scaled.value, plan.value * mass, rtol=1e-5, atol=0)
    same(scaled.supply_potential, plan.supply_potential, rtol=0, atol=1e-6)


def test_totals_that_differ_by_rounding_are_balanced(solver, make_problem):
    cost, supply, demand = make_problem(7, 6)
    plan = solve(cost, supply, demand * (1 + 5e-5), solver=solver)
    same(plan.flow.sum((-2, -1)), supply.sum(-1), rtol=1e-5, atol=0)
    same(plan.value, solve(cost, supply, demand, solver=solver).value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("N", "M"), [(64, 64), (65, 64), (3, 90)])
def test_any_size_is_solved(exact_solver, N, M, make_problem, oracle, certify):
    problem = make_problem(N, M, batch=2, seed=N)
    plan = solve(*problem, solver=exact_solver)
    same(plan.value.double(), oracle(*problem), rtol=0, atol=1e-6)
    certify(problem, plan)


def test_native_size_is_one_number():
    assert SIMPLEX_NODES == MAX_NODES


def test_plan_of_an_exact_solver_has_no_graph(exact_solver, make_problem):
    cost, supply, demand = make_problem(3, 4)
    plan = solve(cost.requires_grad_(), supply.requires_grad_(), demand, solver=exact_solver)
    for part in (plan.value, plan.flow, plan.supply_potential, plan.demand_potential):
        assert not part.requires_grad


@pytest.mark.parametrize("name", ["sinkhorn", "qp"])
def test_flow_of_a_torch_solver_is_differentiable(name, make_problem):
    cost, supply, demand = make_problem(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(
        solve(cost.requires_grad_(), supply, demand, solver=name).flow[:, 0, 0].sum(), cost
    )
    assert gradient.abs().amax((-2, -1)).gt(0).all()


def test_unknown_solver_is_named(make_problem):
    with pytest.raises(ValueError, match=r"solver: expected one of simplex, pot.*did you mean"):
        solve(*make_problem(2, 2), solver="simplx")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pot", {"epsilon": 0.1}, "'pot' takes no options; got epsilon"),
        ("simplex", {"most_pivots": 3}, "'simplex' takes no options; got most_pivots"),
        ("sinkhorn", {"strength": 1.0}, "'sinkhorn' takes the options epsilon, .*; got strength"),
        ("qp", {"iterations": 3}, "'qp' takes the options form, strength, .*; got iterations"),
    ],
)
def test_foreign_option_is_named(name, options, message, make_problem):
    with pytest.raises(TypeError, match=message):
        solve(*make_problem(2, 2), solver=name, **options)


def test_options_reach_the_solver(make_problem):
    problem = make_problem(6, 6)
    blurred = solve(*problem, solver="sinkhorn", epsilon=10.0, iterations=50).flow
    # At a temperature far above every cost the plan forgets the costs.
    same(blurred, problem[1][:, :, None] * problem[2][:, None, :], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", ["simplex", "pot", "opencv"])
def test_device_is_never_left_unasked(name):
    on_meta = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, device="meta")
    demand = torch.empty(2, 4, device="meta")
    with pytest.raises(ValueError, match=r"on meta; .*cpu_round_trip=True"):
        solve(*on_meta, demand, solver=name)


def test_cuda_tensors_go_to_the_cuda_simplex_or_are_refused():
    assert _choose("simplex", 64, "cuda").path == "cuda:solve_simplex_cuda"
    assert _choose("qp", 100, "cuda") is SOLVERS["qp"]
    for name, nodes in (("simplex", 65), ("pot", 5), ("opencv", 5)):
        with pytest.raises(ValueError, match=r"runs on cpu, got tensors on cuda; .*sinkhorn.*qp"):
            _choose(name, nodes, "cuda")


def test_cpu_round_trip_of_a_cpu_tensor_is_nothing(solver, make_problem):
    problem = make_problem(4, 4)
    same(
        solve(*problem, solver=solver, cpu_round_trip=True).value,
        solve(*problem, solver=solver).value,
        rtol=0,
        atol=0,
    )


def test_cuda_simplex_needs_no_native_module(monkeypatch):
    monkeypatch.setattr(solve_module, "find_spec", lambda name: None if "_native" in name else True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _choose("simplex", 64, "cuda").requires == "cuda"
    assert "simplex" in available_solvers()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "simplex" not in available_solvers()


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.0**125), (torch.float64, 2.0**1021)])
def test_costs_without_room_for_potentials_are_refused(solver, partial, dtype, most):
    cost = torch.zeros(2, 2, 3, dtype=dtype)
    cost[1, 0, 0], cost[1, 1, 2] = -most, most
    supply, demand = cost.new_full((2, 2), 0.5), cost.new_full((2, 3), 1 / 3)
    if solver in ("simplex", "pot"):
        plan = solve(cost, supply, demand, solver=solver, partial=partial)
        for part in (plan.value, plan.flow, plan.supply_potential, plan.demand_potential):
            assert torch.isfinite(part).all()
    cost[1, 0, 0] *= 1.01
    words = r"cost: expected costs of at most (4.25e\+37|2.25e\+307) .*problem \[1\]"
    with pytest.raises(ValueError, match=words):
        solve(cost, supply, demand, solver=solver, partial=partial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_overflow_are_refused(solver, dtype):
    most = torch.finfo(dtype).max
    cost = torch.full((2, 2, 2), most / 16, dtype=dtype)
    weights = torch.tensor([[5.0, 5.0], [9.0, 9.0]], dtype=dtype)
    solve(cost[:1], weights[:1], weights[:1], solver="simplex")
    with pytest.raises(ValueError, match=r"cost, supply: .* a mass of 18 .*; problem \[1\]"):
        solve(cost, weights, weights, solver=solver)
