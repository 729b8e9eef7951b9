"""The native simplex: every instruction set, exactness, certificates, threads, faults, top-k."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emd_retrieval.transport import TransportPlan, _native, simplex
from emd_retrieval.transport.pot import solve_pot
from emd_retrieval.transport.problem import InvalidProblemError

Problems = tuple[Tensor, Tensor, Tensor]

SHAPES = (
    *((1, 1), (1, 2), (2, 1), (1, 64), (64, 1), (2, 2), (3, 5), (9, 9), (14, 14), (15, 17)),
    *((16, 16), (16, 33), (17, 16), (25, 14), (25, 25), (32, 32), (32, 64), (33, 32), (33, 33)),
    *((49, 49), (63, 65 - 1), (64, 64)),
)


def weights(kind: str, count: int, n: int, random: np.random.Generator) -> np.ndarray:
    match kind:
        case "relu":
            return np.maximum(random.standard_normal((count, n)), 0) + 1e-3
        case "equal":
            return np.ones((count, n))
        case "integer":
            return random.integers(1, 5, (count, n)).astype(float)
        case "zeros":
            some = random.random((count, n)) * (random.random((count, n)) > 0.4)
            some[np.arange(count), random.integers(n, size=count)] = 1
            return some
        case "one_hot":
            return np.eye(n)[random.integers(n, size=count)] + 1e-6
        case "lognormal":
            return np.exp(4 * random.standard_normal((count, n)))
    raise AssertionError(kind)


def costs(kind: str, count: int, n: int, m: int, random: np.random.Generator) -> np.ndarray:
    sides = (random.standard_normal((count, k, 8)) + 0.5 for k in (n, m))
    left, right = (side / np.linalg.norm(side, axis=-1, keepdims=True) for side in sides)
    cosine = 1 - left @ right.transpose(0, 2, 1)
    match kind:
        case "cosine":
            return cosine
        case "zero":
            return np.zeros_like(cosine)
        case "constant":
            return np.full_like(cosine, 0.7)
        case "quantised":
            return np.round(cosine * 4) / 4
        case "duplicated":
            rows, columns = random.integers(n, size=n), random.integers(m, size=m)
            return cosine[:, rows][:, :, columns]
        case "negative":
            return cosine - 2
        case "far":
            return cosine + 1000
        case "huge":
            return np.exp(3 * random.standard_normal(cosine.shape)) * 1e9
    raise AssertionError(kind)


WEIGHT_KINDS = ("relu", "equal", "integer", "zeros", "one_hot", "lognormal")
COST_KINDS = ("cosine", "zero", "constant", "quantised", "duplicated", "negative", "far", "huge")


def make(
    n: int,
    m: int,
    *,
    count: int = 4,
    weight_kind: str = "relu",
    cost_kind: str = "cosine",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problems:
    random = np.random.default_rng(seed)
    cost = costs(cost_kind, count, n, m, random)
    supply, demand = (weights(weight_kind, count, k, random) for k in (n, m))
    demand *= supply.sum(1, keepdims=True) / demand.sum(1, keepdims=True)
    cost_tensor, *sides = (
        torch.from_numpy(np.ascontiguousarray(part)).to(dtype) for part in (cost, supply, demand)
    )
    return cost_tensor, sides[0], sides[1]


def parts(plan: TransportPlan) -> list[Tensor]:
    every = [plan.value, plan.flow, plan.supply_potential, plan.demand_potential]
    return [part for part in every if part is not None]


def same(a: TransportPlan, b: TransportPlan) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def assert_optimal(problems: Problems, plan: TransportPlan, tolerance: float = 2.5e-7) -> None:
    """Flow and potentials feasible, and of one value: each proves the other optimal."""
    assert plan.flow is not None
    assert plan.supply_potential is not None
    assert plan.demand_potential is not None
    cost, supply, demand = (part.double() for part in problems)
    mass = supply.sum(1)
    demand = demand * (mass / demand.sum(1))[:, None]
    flow, value = plan.flow.double(), plan.value.double()
    u, v = plan.supply_potential.double(), plan.demand_potential.double()
    unit = cost.amax((1, 2)) - cost.amin((1, 2))
    if problems[0].dtype == torch.float32:
        unit = torch.maximum(unit, cost.abs().amax((1, 2)))
    unit = torch.where(unit > 0, unit, torch.maximum(cost.abs().amax((1, 2)), torch.tensor(1e-300)))

    assert (flow >= 0).all()
    assert ((flow.sum(2) - supply).abs().amax(1) <= 1e-7 * mass).all()
    assert ((flow.sum(1) - demand).abs().amax(1) <= 1e-7 * mass).all()
    assert ((flow > 0).sum((1, 2)) <= sum(cost.shape[1:]) - 1).all(), "more arcs than a tree has"
    reduced = cost - u[:, :, None] - v[:, None, :]
    assert (reduced.amin((1, 2)) >= -2e-7 * unit).all()
    assert ((reduced * (flow > 0)).amax((1, 2)) <= 2e-7 * unit).all()
    assert (
        (value - (supply * u).sum(1) - (demand * v).sum(1)).abs() <= tolerance * unit * mass
    ).all()
    assert (u.mean(1).abs() <= 1e-7 * unit).all()


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_instruction_sets_name_at_least_one() -> None:
    names = simplex.instruction_sets()
    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype) -> None:
    for seed, (n, m) in enumerate(SHAPES):
        kinds = zip(WEIGHT_KINDS, COST_KINDS[seed % 3 :], strict=False)
        for weight_kind, cost_kind in kinds:
            problems = make(
                n, m, weight_kind=weight_kind, cost_kind=cost_kind, dtype=dtype, seed=seed
            )
            first, *others = (
                simplex.solve_simplex(*problems, instruction_set=name)
                for name in simplex.instruction_sets()
            )
            assert all(same(first, other) for other in others), (n, m, weight_kind, cost_kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_kind", WEIGHT_KINDS)
def test_plans_prove_themselves_optimal(weight_kind: str, dtype: torch.dtype) -> None:
    for seed, ((n, m), cost_kind) in enumerate(product(SHAPES, COST_KINDS)):
        problems = make(n, m, weight_kind=weight_kind, cost_kind=cost_kind, dtype=dtype, seed=seed)
        assert_optimal(problems, simplex.solve_simplex(*problems))


def test_values_agree_with_pot() -> None:
    for seed, ((n, m), weight_kind) in enumerate(product(SHAPES, WEIGHT_KINDS)):
        cost, supply, demand = make(n, m, weight_kind=weight_kind, seed=seed)
        mass = supply.double().sum(1)
        demand64 = demand.double() * (mass / demand.double().sum(1))[:, None]
        expected = solve_pot(cost.double(), supply.double(), demand64).value
        value = simplex.solve_simplex(cost, supply, demand).value.double()
        assert ((value - expected).abs() <= 1e-7 * 2 * mass).all(), (n, m, weight_kind)


def test_cosine_costs_lose_nothing_up_to_32_nodes() -> None:
    """Multiples of 2^-24 in a range of 2: the potentials are exact and prove the value exactly."""
    random = np.random.default_rng(5)
    for n, m in ((7, 9), (25, 25), (32, 32), (32, 64), (64, 20)):
        ticks = random.integers(0, 2**25 + 1, (16, n, m))
        cost = torch.from_numpy(ticks * 2.0**-24).float()
        assert cost.max() > 1.9
        supply = torch.from_numpy(random.integers(0, 9, (16, n)) + 1.0).float()
        demand = torch.zeros(16, m)
        demand[:, 0] = supply.sum(1) - (m - 1) / 8
        demand[:, 1:] = 1 / 8
        plan = simplex.solve_simplex(cost.double(), supply.double(), demand.double())
        assert plan.supply_potential is not None
        assert plan.demand_potential is not None
        dual = (plan.supply_potential * supply).sum(1) + (plan.demand_potential * demand).sum(1)
        assert ((plan.value - dual).abs() <= 1e-12 * plan.value).all()
        reduced = cost.double() - plan.supply_potential[:, :, None] - plan.demand_potential[:, None]
        assert reduced.min() >= -1e-12


def test_wide_cosine_costs_stay_within_the_bound() -> None:
    random = np.random.default_rng(6)
    cost = torch.from_numpy(random.integers(0, 2**25 + 1, (64, 40, 40)) * 2.0**-24)
    equal = torch.ones(64, 40, dtype=torch.float64)
    value = simplex.solve_simplex(cost, equal, equal).value
    best = solve_pot(cost, equal, equal).value
    assert (value >= best - 1e-9).all()
    assert (value <= best + 40 * 2.0**-24 + 1e-9).all()


@pytest.mark.parametrize(
    ("scale", "offset", "dtype"),
    [
        (1e-44, 0.0, torch.float32),
        (1e-38, -3e-38, torch.float32),
        (2e37, 0.0, torch.float32),
        (3e37, -4e37, torch.float32),
        (1.0, 65536.0, torch.float32),
        (5e-324, 0.0, torch.float64),
        (1e-300, 0.0, torch.float64),
        (2e307, -2e307, torch.float64),
        (1.0, 1e12, torch.float64),
    ],
)
def test_costs_of_extreme_scale(scale: float, offset: float, dtype: torch.dtype) -> None:
    for n, m in ((1, 1), (3, 4), (25, 25), (40, 50)):
        random = np.random.default_rng(n)
        cost = torch.from_numpy(random.integers(0, 8, (8, n, m)) / 4 * scale + offset).to(dtype)
        equal = torch.full((8, n), 1 / n, dtype=dtype), torch.full((8, m), 1 / m, dtype=dtype)
        plan = simplex.solve_simplex(cost, *equal)
        # The same problem in moderate numbers; a long double holds the sums of the largest.
        wide = cost.numpy().astype(np.longdouble)
        spread = wide - wide.min()
        moderate = torch.from_numpy((spread / (spread.max() or 1)).astype(float))
        best = solve_pot(moderate, *(side.double() for side in equal)).value
        assert plan.flow is not None
        found = (plan.flow.double() * moderate).sum((1, 2))
        assert ((found - best).abs() <= 1e-6).all()
        assert all(torch.isfinite(part).all() for part in parts(plan))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-3, 1e30, 1e300])
def test_masses_of_any_scale(scale: float) -> None:
    cost, supply, demand = make(9, 14, dtype=torch.float64, weight_kind="zeros")
    once = simplex.solve_simplex(cost, supply, demand)
    scaled = simplex.solve_simplex(cost, supply * scale, demand * scale)
    assert once.flow is not None
    assert scaled.flow is not None
    torch.testing.assert_close(scaled.value / scale, once.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.flow / scale, once.flow, rtol=1e-9, atol=1e-13)


def test_zero_weights_ship_nothing_and_have_valid_potentials() -> None:
    cost, supply, demand = make(14, 9, weight_kind="zeros")
    plan = simplex.solve_simplex(cost, supply, demand)
    assert plan.flow is not None
    assert (plan.flow[supply == 0] == 0).all()
    assert (plan.flow.mT[demand == 0] == 0).all()
    assert_optimal((cost, supply, demand), plan)


def test_demand_is_scaled_to_the_total_of_supply() -> None:
    cost, supply, demand = make(6, 7, dtype=torch.float64)
    exact = simplex.solve_simplex(cost, supply, demand)
    off = simplex.solve_simplex(cost, supply, demand * (1 + 5e-5))
    torch.testing.assert_close(off.value, exact.value, rtol=1e-12, atol=0)


def test_value_only_is_the_value_of_the_plan() -> None:
    problems = make(25, 25, count=64)
    plan = simplex.solve_simplex(*problems)
    value_only = simplex.solve_simplex(*problems, need_flow=False, need_potentials=False)
    assert value_only.flow is None
    assert value_only.supply_potential is None
    assert value_only.demand_potential is None
    assert torch.equal(value_only.value, plan.value)


def test_problems_do_not_depend_on_their_batch() -> None:
    """Also not on what lies behind them in memory, which the solver reads over."""
    for n, m in ((1, 1), (3, 5), (14, 14), (25, 14), (33, 40)):
        problems = make(n, m, count=7)
        together = simplex.solve_simplex(*problems)
        for k in range(7):
            alone = simplex.solve_simplex(*(part[k : k + 1].clone() for part in problems))
            pairs = zip(parts(alone), parts(together), strict=True)
            assert all(torch.equal(x[0], y[k]) for x, y in pairs)


def test_two_threads_give_what_one_gives(two_threads: None) -> None:
    problems = make(25, 25, count=3000)
    two = simplex.solve_simplex(*problems)
    torch.set_num_threads(1)
    assert same(two, simplex.solve_simplex(*problems))


def test_concurrent_calls_do_not_disturb_each_other(two_threads: None) -> None:
    jobs = [make(n, m, count=300, seed=s) for s, (n, m) in enumerate(SHAPES[4:] * 2)]
    expected = [simplex.solve_simplex(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: simplex.solve_simplex(*job), jobs))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_the_gil_is_released() -> None:
    problems = make(49, 49, count=8000, weight_kind="equal")
    ticks = 0
    worker = threading.Thread(target=simplex.solve_simplex, args=problems)
    worker.start()
    while worker.is_alive():
        time.sleep(1e-4)
        ticks += 1
    assert ticks > 5


def _solve_in_child(problems: Problems, connection: Any) -> None:
    connection.send(simplex.solve_simplex(*problems).value.numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_works_after_a_fork(two_threads: None) -> None:
    problems = make(25, 25, count=2000)
    expected = simplex.solve_simplex(*problems).value  # threads have run before the fork
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_solve_in_child, args=(problems, there))
    child.start()
    assert here.poll(60), "the child did not answer"
    assert np.array_equal(here.recv(), expected.numpy())
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_an_interrupt_stops_a_long_call() -> None:
    count = 400_000
    cost = torch.rand(count, 9, 9, generator=torch.Generator().manual_seed(0)).numpy()
    equal = np.ones((count, 9), np.float32)
    value = np.full(count, np.nan, np.float32)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(KeyboardInterrupt):
            _native.solve(cost, equal, equal, value, None, None, None, 10_000, 1, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.isnan(value).any(), "every problem was solved all the same"
    assert not np.isnan(value[0])


@pytest.mark.parametrize(
    ("part", "position", "value", "words"),
    [
        (0, (5, 2, 1), float("nan"), r"cost: .* got nan at \[2, 1\]"),
        (0, (5, 0, 0), float("nan"), r"cost: .* got nan at \[0, 0\]"),
        (0, (5, 24, 24), float("inf"), r"cost: .* got inf at \[24, 24\]"),
        (0, (5, 3, 4), float("-inf"), r"cost: .* got -inf"),
        (1, (5, 3), -0.5, r"supply: .* got -0.5 at node 3"),
        (1, (5, 0), float("nan"), r"supply: .* got nan"),
        (1, (5, 0), float("inf"), r"supply: .* got inf"),
        (2, (5, 24), -(2.0**-30), r"demand: .* got -9.31"),
        (2, (5, 2), float("nan"), r"demand: .* got nan"),
        (2, (5, 2), float("inf"), r"demand: .* got inf"),
        (1, (5,), 0.0, "supply: expected a positive total"),
        (2, (5,), 0.0, "demand: expected a positive total"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_faults_are_found_and_placed(
    part: int, position: tuple[int, ...], value: float, words: str, dtype: torch.dtype
) -> None:
    problems = make(25, 25, count=9, dtype=dtype)
    problems[part][position] = value
    for name in simplex.instruction_sets():
        with pytest.raises(InvalidProblemError, match=words + r".*problem \[5\]"):
            simplex.solve_simplex(*problems, instruction_set=name)
    with pytest.raises(InvalidProblemError, match=words):
        simplex.native_lower_bound(*problems)
    with pytest.raises(InvalidProblemError, match=words + r".*problem \[1, 2\] of .* \[3, 3\]"):
        simplex.simplex_top_k(*(p.unflatten(0, (3, 3)) for p in problems), k=1)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_stops_the_candidates_of_few_queries(threads: int) -> None:
    """Nobody waits for the end of a query: one may have any number of candidates."""
    candidates = 200_000
    cost = torch.rand(2 * candidates, 9, 9, generator=torch.Generator().manual_seed(0)).numpy()
    cost[candidates:] = 0.5  # solved at once, so that the calling thread may end first
    equal, mass = np.ones((2 * candidates, 9), np.float32), np.full(2 * candidates, 9, np.float32)
    distance, index = np.empty((2, candidates), np.float32), np.empty((2, candidates), np.int64)
    solved = np.full(2, -1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(KeyboardInterrupt):
            _native.top_k(cost, equal, equal, mass, distance, index, solved, 10_000, threads, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (solved == -1).any(), "every query was finished all the same"


def test_totals_that_differ_are_a_fault() -> None:
    cost, supply, demand = make(5, 6)
    simplex.solve_simplex(cost, supply, demand * (1 - 0.9e-4))
    with pytest.raises(InvalidProblemError, match=r"totals equal to 0.0001 .*problem \[0\]"):
        simplex.solve_simplex(cost, supply, demand * (1 - 1.2e-4))


def test_of_many_faults_the_first_is_told(two_threads: None) -> None:
    cost, supply, demand = make(25, 25, count=4000)
    cost[701::97] = torch.nan
    for _ in range(5):
        with pytest.raises(InvalidProblemError, match=r"problem \[701\]"):
            simplex.solve_simplex(cost, supply, demand)


def test_too_many_pivots_are_an_error() -> None:
    problems = make(49, 49, weight_kind="equal")
    with pytest.raises(RuntimeError, match=r"problem 0 of 4 takes over 3 pivots .*\[49, 49\]"):
        simplex.solve_simplex(*problems, most_pivots=3)


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="instruction_set: expected one of"):
        simplex.solve_simplex(*make(2, 2), instruction_set="mmx")


def test_the_core_takes_only_what_fits() -> None:
    cost, supply, demand = (part.numpy() for part in make(3, 4))
    value = np.empty(4, np.float32)
    rest = (None, None, None, 10, 1, None)
    with pytest.raises(TypeError):
        _native.solve(cost.astype(np.float16), supply, demand, value, *rest)
    with pytest.raises(TypeError):
        _native.solve(cost.transpose(0, 2, 1), demand, supply, value, *rest)
    with pytest.raises(TypeError):
        _native.solve(cost, supply, demand, value.astype(float), *rest)
    with pytest.raises(ValueError, match="cost's sizes"):
        _native.solve(cost, demand, supply, value, *rest)
    with pytest.raises(ValueError, match="value: wrong size"):
        _native.solve(cost, supply, demand, value[:3], *rest)
    ones = np.ones((1, 65), np.float32)
    with pytest.raises(ValueError, match="1 to 64 nodes"):
        _native.solve(np.ones((1, 65, 65), np.float32), ones, ones, value[:1], *rest)


def test_an_empty_batch_is_a_batch() -> None:
    plan = simplex.solve_simplex(torch.zeros(0, 3, 4), torch.zeros(0, 3), torch.zeros(0, 4))
    assert plan.value.shape == (0,)
    assert plan.flow is not None
    assert plan.flow.shape == (0, 3, 4)
    nearest = simplex.simplex_top_k(
        torch.zeros(0, 5, 3, 4), torch.zeros(0, 5, 3), torch.zeros(0, 5, 4), k=2
    )
    assert [tuple(part.shape) for part in nearest] == [(0, 2), (0, 2), (0,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lower_bound_is_one_and_tight(dtype: torch.dtype) -> None:
    for seed, ((n, m), cost_kind) in enumerate(product(SHAPES, COST_KINDS)):
        problems = make(n, m, cost_kind=cost_kind, weight_kind="zeros", dtype=dtype, seed=seed)
        bound = simplex.native_lower_bound(*problems).double()
        value = simplex.solve_simplex(*problems).value.double()
        rounding = 1.2e-7 if dtype == torch.float32 else 1e-13
        assert (bound <= value + rounding * value.abs()).all()
        # It is exact where one side has one node, and whichever way it is formed.
        cost, supply, demand = (part.double() for part in problems)
        demand = demand * (supply.sum(1) / demand.sum(1))[:, None]
        formed = []
        for c, a, b in ((cost, supply, demand), (cost.mT, demand, supply)):
            u = c.amin(2)
            formed.append((a * u).sum(1) + (b * (c - u[:, :, None]).amin(1)).sum(1))
        best = torch.maximum(*formed)
        # Weights are rounded to 2^-48 of the mass, whatever the value.
        rounding = 1e-12 * cost.abs().amax((1, 2)) * supply.sum(1)
        assert ((bound - best).abs() <= 1e-6 * (best.abs() + value.abs()) + rounding).all()


def expected_top_k(problems: Problems, k: int) -> tuple[Tensor, Tensor]:
    queries, candidates = problems[0].shape[:2]
    cost, supply, demand = (part.flatten(0, 1) for part in problems)
    value = simplex.solve_simplex(cost, supply, demand).value
    distance = value / supply.sum(1, dtype=torch.float64).to(value.dtype)
    order = distance.view(queries, candidates).sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost_kind", ["cosine", "quantised", "negative", "far", "constant"])
def test_top_k_is_what_full_solving_gives(cost_kind: str, dtype: torch.dtype) -> None:
    for seed, (n, m) in enumerate(((1, 1), (3, 5), (9, 9), (14, 14), (25, 25), (33, 40))):
        queries, candidates = 4, 40
        flat = make(n, m, count=queries * candidates, cost_kind=cost_kind, dtype=dtype, seed=seed)
        problems = tuple(part.unflatten(0, (queries, candidates)).clone() for part in flat)
        for part in problems:
            part[:, 20:25] = part[:, :5]  # candidates that tie
        problems[1][:, ::3] *= 7  # and some with more mass
        problems[2][:, ::3] *= 7
        for k in (1, 10, 40):
            distance, index, solved = simplex.simplex_top_k(*problems, k=k)
            expected = expected_top_k(problems, k)  # type: ignore[arg-type]
            assert torch.equal(distance, expected[0])
            assert torch.equal(index, expected[1])
            assert ((solved >= k) & (solved <= candidates)).all()


def test_top_k_solves_few_candidates_where_one_is_near(two_threads: None) -> None:
    flat = make(25, 25, count=6000)
    flat[0][::100] *= 0.5
    problems = tuple(part.unflatten(0, (60, 100)) for part in flat)
    _, index, solved = simplex.simplex_top_k(*problems, k=1)
    assert (index == 0).all()
    assert (solved == 1).all()


def test_top_k_refuses_more_than_there_are() -> None:
    problems = tuple(part[None] for part in make(3, 3))
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k: expected 1 to 4, .* got {k}"):
            simplex.simplex_top_k(*problems, k=k)
