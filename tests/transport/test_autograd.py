"""``emd``: its gradient, and its life under autocast, ``no_grad``, compile, fork and threads."""

from __future__ import annotations

import importlib
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from emd_retrieval.transport import emd, solve

# The package's attribute ``solve`` is the function, which hides the module of that name.
solve_module = importlib.import_module("emd_retrieval.transport.solve")
OP = torch.ops.emd_retrieval.emd.default


def requiring_grad(problem):
    return tuple(part.clone().requires_grad_() for part in problem)


def normalised(weights):
    return weights / weights.sum(-1, keepdim=True)


def test_gradient_is_the_plan(exact_solver, make_problem):
    inputs = requiring_grad(make_problem(6, 9, batch=4))
    value = emd(*inputs, solver=exact_solver)
    factor = torch.tensor([1.0, -2.0, 0.5, 0.0])
    gradients = torch.autograd.grad(value, inputs, factor)
    plan = solve(*inputs, solver=exact_solver)
    torch.testing.assert_close(value.detach(), plan.value, rtol=0, atol=0)
    for gradient, part in zip(
        gradients, (plan.flow, plan.supply_potential, plan.demand_potential), strict=True
    ):
        expected = part * factor.reshape(-1, *[1] * (part.dim() - 1))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("N", "M"), [(4, 4), (3, 6), (7, 2), (1, 5)])
def test_gradient_is_that_of_finite_differences(exact_solver, N, M, make_problem):
    # Weights are normalised inside, so that every direction keeps the totals equal.
    def value(cost, supply, demand):
        return emd(cost, normalised(supply), normalised(demand), solver=exact_solver)

    inputs = requiring_grad(
        make_problem(N, M, batch=2, weights="generic", dtype=torch.float64, seed=N)
    )
    assert torch.autograd.gradcheck(value, inputs, eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sinkhorn", "qp"])
def test_torch_solvers_go_through_the_same_function(name, make_problem):
    inputs = requiring_grad(make_problem(4, 5, dtype=torch.float64))
    gradients = torch.autograd.grad(emd(*inputs, solver=name).sum(), inputs)
    expected = torch.autograd.grad(solve(*inputs, solver=name).value.sum(), inputs)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_qp_gradient_tends_to_the_exact_one(make_problem):
    cost, supply, demand = requiring_grad(make_problem(5, 5, dtype=torch.float64))
    exact, smooth = (
        torch.autograd.grad(emd(cost, supply, demand, solver=name).sum(), cost)[0]
        for name in ("pot", "qp")
    )
    torch.testing.assert_close(smooth, exact, rtol=0, atol=1e-3)


def test_leading_dimensions(exact_solver, make_problem):
    cost, supply, demand = make_problem(4, 6, batch=6)
    inputs = requiring_grad(
        (cost.reshape(2, 3, 4, 6), supply.reshape(2, 3, 4), demand.reshape(2, 3, 6))
    )
    value = emd(*inputs, solver=exact_solver)
    assert value.shape == (2, 3)
    value[1, 2].backward()
    assert [part.grad.shape for part in inputs] == [part.shape for part in inputs]
    assert inputs[0].grad[1, 2].sum() == pytest.approx(1)
    assert inputs[0].grad[:1].count_nonzero() == 0


def test_strided_inputs_get_their_gradient(exact_solver, make_problem):
    cost, supply, demand = make_problem(4, 6)
    leaf = cost.mT.contiguous().requires_grad_()
    emd(leaf.mT, supply, demand, solver=exact_solver).sum().backward()
    plan = solve(cost, supply, demand, solver=exact_solver)
    torch.testing.assert_close(leaf.grad, plan.flow.mT, rtol=0, atol=0)


def test_empty_batch_is_differentiable(solver):
    cost = torch.empty(0, 3, 4, requires_grad=True)
    value = emd(cost, torch.empty(0, 3), torch.empty(0, 4), solver=solver)
    value.sum().backward()
    assert value.shape == (0,)
    assert cost.grad.shape == (0, 3, 4)


@pytest.fixture
def asked(monkeypatch):
    """What the solver was asked for, call by call: (flow, potentials)."""
    calls = []
    load = solve_module._load

    def recording(solver):
        function = load(solver)

        def call(*args, need_flow, need_potentials, **options):
            calls.append((need_flow, need_potentials))
            return function(*args, need_flow=need_flow, need_potentials=need_potentials, **options)

        return call

    monkeypatch.setattr(solve_module, "_load", recording)
    return calls


def test_only_what_the_gradient_needs_is_computed(exact_solver, make_problem, asked):
    cost, supply, demand = make_problem(4, 5)
    leaf = cost.clone().requires_grad_()
    emd(cost, supply, demand, solver=exact_solver)
    with torch.no_grad():
        emd(leaf, supply, demand, solver=exact_solver)
    with torch.inference_mode():
        emd(leaf, supply, demand, solver=exact_solver)
    emd(leaf, supply, demand, solver=exact_solver)
    emd(cost, supply, demand.clone().requires_grad_(), solver=exact_solver)
    emd(leaf, supply.clone().requires_grad_(), demand, solver=exact_solver)
    nothing, flow, potentials = (False, False), (True, False), (False, True)
    assert asked == [nothing, nothing, nothing, flow, potentials, (True, True)]


def test_value_does_not_depend_on_the_path(exact_solver, make_problem):
    problem = make_problem(6, 6)
    differentiable = emd(*requiring_grad(problem), solver=exact_solver)
    plain = emd(*problem, solver=exact_solver)
    assert differentiable.requires_grad
    assert not plain.requires_grad
    assert torch.equal(differentiable.detach(), plain)


def test_opencv_gives_a_gradient_to_costs_alone(make_problem):
    cost, supply, demand = requiring_grad(make_problem(5, 5))
    emd(cost, supply.detach(), demand.detach(), solver="opencv").sum().backward()
    expected = solve(cost, supply, demand, solver="pot").flow
    torch.testing.assert_close(cost.grad, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="detach the weights, or choose solver='simplex' or 'pot'"):
        emd(cost, supply, demand.detach(), solver="opencv")
    with torch.no_grad():
        emd(cost, supply, demand, solver="opencv")


def test_second_derivative_is_refused(exact_solver, make_problem):
    inputs = requiring_grad(make_problem(3, 3))
    value = emd(*inputs, solver=exact_solver).sum()
    with pytest.raises(RuntimeError, match="cannot itself be differentiated"):
        torch.autograd.grad(value, inputs, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
def test_operator_is_registered_in_full(exact_solver, leading, dtype, needs, make_problem):
    count = torch.Size(leading).numel()
    cost, supply, demand = make_problem(3, 5, batch=count, dtype=dtype)
    inputs = (
        cost.reshape(*leading, 3, 5).requires_grad_(needs[0]),
        supply.reshape(*leading, 3).requires_grad_(needs[1]),
        demand.reshape(*leading, 5).requires_grad_(needs[1]),
    )
    torch.library.opcheck(OP, (*inputs, exact_solver, False, False, False, *needs))


@pytest.mark.parametrize("partial", [False, True])
def test_compiled_graph_equals_eager(exact_solver, partial, make_problem):
    def loss(cost, supply, demand):
        values = emd(cost.exp(), supply, normalised(demand), solver=exact_solver, partial=partial)
        return (values * torch.arange(1.0, len(values) + 1)).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for batch, N in ((2, 4), (5, 6), (3, 7)):
        inputs = requiring_grad(make_problem(N, 5, batch=batch, seed=N))
        expected = loss(*inputs)
        torch.testing.assert_close(compiled(*inputs), expected)
        for gradient, other in zip(
            torch.autograd.grad(compiled(*inputs), inputs),
            torch.autograd.grad(expected, inputs),
            strict=True,
        ):
            torch.testing.assert_close(gradient, other)


def test_compiled_graph_without_gradient(exact_solver, make_problem):
    torch.compiler.reset()
    problem = make_problem(4, 5)
    compiled = torch.compile(
        lambda *parts: emd(*parts, solver=exact_solver) * 2, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(*problem), 2 * emd(*problem, solver=exact_solver))


@pytest.mark.parametrize("name", ["sinkhorn", "qp"])
def test_torch_solvers_run_in_a_compiled_function(name, make_problem):
    def loss(*parts):
        return (emd(*parts, solver=name) * 2).sum()

    torch.compiler.reset()
    inputs = requiring_grad(make_problem(4, 5))
    value = torch.compile(loss, backend="aot_eager")(*inputs)
    torch.testing.assert_close(value, loss(*inputs))
    for gradient, other in zip(
        torch.autograd.grad(value, inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, other)


def test_autocast_does_not_touch_the_solver(solver, make_problem):
    problem = make_problem(5, 6)
    expected = emd(*problem, solver=solver)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(emd(*problem, solver=solver), expected)


def test_gradient_reaches_half_precision(solver):
    generator = torch.Generator().manual_seed(0)
    query = torch.rand(2, 4, 8, generator=generator, requires_grad=True)
    reference = torch.rand(2, 5, 8, generator=generator)
    weights = torch.full((2, 4), 1 / 4), torch.full((2, 5), 1 / 5)
    with torch.autocast("cpu", torch.bfloat16):
        cost = query @ reference.mT
        assert cost.dtype == torch.bfloat16
        value = emd(cost, *weights, solver=solver)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert query.grad.isfinite().all()
    assert query.grad.count_nonzero() > 0


class Distances(Dataset):
    """Solves in the worker process, as a miner or a collate function might."""

    def __init__(self, problem, solver):
        self.problem, self.solver = problem, solver

    def __len__(self):
        return len(self.problem[0])

    def __getitem__(self, index):
        return emd(*(part[index] for part in self.problem), solver=self.solver)


def test_data_loader_workers(solver, make_problem):
    problem = make_problem(5, 5, batch=8)
    expected = emd(*problem, solver=solver)
    loader = DataLoader(
        Distances(problem, solver), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def busy_torch_threads():
    """A process that has used torch's own threads, which a fork does not take along."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(1_000_000).exp().sum()
    yield
    torch.set_num_threads(before)


def _solve_in_child(problem, solver, threads, queue):
    if threads is not None:
        torch.set_num_threads(threads)
    inputs = requiring_grad(problem)
    value = emd(*inputs, solver=solver)
    value.sum().backward()
    queue.put([part.tolist() for part in (value.detach(), *(part.grad for part in inputs))])


def _expect_the_same_of_a_fork(problem, solver, threads):
    inputs = requiring_grad(problem)
    value = emd(*inputs, solver=solver)
    value.sum().backward()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_solve_in_child, args=(problem, solver, threads, queue))
    child.start()
    try:
        theirs = queue.get(timeout=60)
        child.join(60)
    finally:
        child.kill()
    assert child.exitcode == 0
    ours = (value.detach(), *(part.grad for part in inputs))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.tensor(other), rtol=0, atol=0)


def test_forked_process_solves_and_differentiates(exact_solver, make_problem, busy_torch_threads):
    # Small tensors: torch's own operators hang here where they would use its threads.
    _expect_the_same_of_a_fork(make_problem(5, 5, batch=64), exact_solver, threads=None)


def test_forked_process_of_one_torch_thread_solves_any_batch(
    exact_solver, make_problem, busy_torch_threads
):
    _expect_the_same_of_a_fork(make_problem(14, 14, batch=400), exact_solver, threads=1)


def test_threads_do_not_disturb_each_other(exact_solver, make_problem):
    problems = [make_problem(6, 7, batch=16, seed=seed) for seed in range(8)]
    expected = [emd(*problem, solver=exact_solver) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            values = pool.map(lambda problem: emd(*problem, solver=exact_solver), problems)
            for value, other in zip(values, expected, strict=True):
                assert torch.equal(value, other)
