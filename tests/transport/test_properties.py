"""Laws that hold for every transportation problem, on problems of any shape, kind and scale.

A few dozen problems a law by default, the same ones every time; ``HYPOTHESIS_PROFILE=deep`` takes
thousands and other ones each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from emd_retrieval.transport import TransportPlan, emd, lower_bound, solve, solve_top_k

Problem = tuple[Tensor, Tensor, Tensor]

WEIGHTS = ("generic", "relu", "equal", "integer", "zeros", "one_hot", "lognormal")
COSTS = ("cosine", "zero", "constant", "quantised", "duplicated", "negative", "huge", "tiny")
SEEDS = st.integers(0, 2**31 - 1)
NODES = st.one_of(st.integers(1, 9), st.integers(1, 64))
FEW_NODES = st.integers(1, 12)
DTYPES = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(scope="module")
def draw_problem(make_problem: Callable[..., Problem]) -> Callable[..., Problem]:
    """A batch drawn by hypothesis: shape, dtype, kinds of weights and costs, scales of both."""

    def draw_one(
        data: st.DataObject,
        *,
        nodes: st.SearchStrategy[int] = NODES,
        dtype: torch.dtype | None = None,
        weights: tuple[str, ...] = WEIGHTS,
        costs: tuple[str, ...] = COSTS,
        scales: int = 20,
        batch: int = 2,
    ) -> Problem:
        cost, supply, demand = make_problem(
            data.draw(nodes, "N"),
            data.draw(nodes, "M"),
            batch=batch,
            weights=data.draw(st.sampled_from(weights), "weights"),
            cost=data.draw(st.sampled_from(costs), "costs"),
            dtype=torch.float64,
            seed=data.draw(SEEDS, "seed"),
        )
        mass = 2.0 ** data.draw(st.integers(-scales, scales), "log2 of the mass")
        scale = 2.0 ** data.draw(st.integers(-scales, scales), "log2 of the costs")
        dtype = data.draw(DTYPES, "dtype") if dtype is None else dtype
        cost, supply, demand = cost * scale, supply * mass, demand * mass
        return cost.to(dtype), supply.to(dtype), demand.to(dtype)

    return draw_one


def every_part(plan: TransportPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert plan.flow is not None
    assert plan.supply_potential is not None
    assert plan.demand_potential is not None
    return plan.value, plan.flow, plan.supply_potential, plan.demand_potential


def equal(one: TransportPlan, other: TransportPlan) -> bool:
    pairs = zip(every_part(one), every_part(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@given(data=st.data())
def test_the_plan_proves_itself_optimal(
    data: st.DataObject,
    exact_solver: str,
    draw_problem: Callable[..., Problem],
    certify: Callable[..., None],
) -> None:
    problem = draw_problem(data)
    certify(problem, solve(*problem, solver=exact_solver))


@given(data=st.data())
def test_order_of_nodes_does_not_matter(
    data: st.DataObject,
    exact_solver: str,
    draw_problem: Callable[..., Problem],
    certify: Callable[..., None],
) -> None:
    """The plan of the problem in another order, put back into place, is a plan of the problem."""
    cost, supply, demand = draw_problem(data)
    rows, columns = (torch.randperm(n, generator=seeded(data)) for n in cost.shape[1:])
    shuffled = cost[:, rows][:, :, columns], supply[:, rows], demand[:, columns]
    value, flow, u, v = every_part(solve(*shuffled, solver=exact_solver))
    back, across = rows.argsort(), columns.argsort()
    plan = TransportPlan(value, flow[:, back][:, :, across], u[:, back], v[:, across])
    certify((cost, supply, demand), plan)


@given(data=st.data())
def test_sides_may_swap(
    data: st.DataObject,
    exact_solver: str,
    draw_problem: Callable[..., Problem],
    certify: Callable[..., None],
) -> None:
    cost, supply, demand = draw_problem(data)
    value, flow, v, u = every_part(solve(cost.mT, demand, supply, solver=exact_solver))
    centre = u.mean(-1, keepdim=True)
    # Demand is what is scaled where totals differ by rounding.
    back = TransportPlan(value, flow.mT, u - centre, v + centre)
    certify((cost, supply, demand), back, tolerance=2e-6)


@given(data=st.data(), exponent=st.integers(-40, 40))
def test_costs_and_masses_scale(
    data: st.DataObject, exponent: int, draw_problem: Callable[..., Problem]
) -> None:
    """By powers of two, to the bit: the algorithm sees integers only."""
    cost, supply, demand = draw_problem(data, dtype=torch.float64)
    factor = 2.0**exponent
    value, flow, u, v = every_part(solve(cost, supply, demand))
    dearer = every_part(solve(cost * factor, supply, demand))
    heavier = every_part(solve(cost, supply * factor, demand * factor))
    for scaled, expected in zip(
        dearer, (value * factor, flow, u * factor, v * factor), strict=True
    ):
        assert torch.equal(scaled, expected)
    for scaled, expected in zip(heavier, (value * factor, flow * factor, u, v), strict=True):
        assert torch.equal(scaled, expected)


@given(data=st.data())
def test_what_is_added_to_all_costs_of_a_node_is_paid_by_its_mass(
    data: st.DataObject,
    exact_solver: str,
    draw_problem: Callable[..., Problem],
    unit: Callable[..., Tensor],
) -> None:
    cost, supply, demand = draw_problem(data, dtype=torch.float64, weights=WEIGHTS[:5])
    spread = cost.amax() - cost.amin()
    a, b = (torch.rand(n, generator=seeded(data), dtype=cost.dtype) for n in cost.shape[1:])
    moved = cost + spread * (a[:, None] + b)
    expected = solve(cost, supply, demand, solver=exact_solver).value
    expected = expected + spread * (supply @ a + demand @ b)
    error = solve(moved, supply, demand, solver=exact_solver).value - expected
    assert (error.abs() <= 1e-6 * unit(moved, supply, demand)).all()


@given(data=st.data())
def test_the_gradient_bounds_the_value_everywhere(
    data: st.DataObject,
    exact_solver: str,
    draw_problem: Callable[..., Problem],
    unit: Callable[..., Tensor],
) -> None:
    """The value is concave in the costs and convex in the weights: no tangent crosses it."""
    cost, supply, demand = (
        part.requires_grad_() for part in draw_problem(data, dtype=torch.float64, nodes=FEW_NODES)
    )
    value = emd(cost, supply, demand, solver=exact_solver)
    by_cost, by_supply, by_demand = torch.autograd.grad(value.sum(), (cost, supply, demand))
    generator = seeded(data)
    reach = 10.0 ** -data.draw(st.integers(0, 6), "log10 of the step")
    with torch.no_grad():
        step = torch.randn(cost.shape, generator=generator, dtype=cost.dtype)
        other = cost + reach * cost.abs().amax() * step
        tangent = value + (by_cost * (other - cost)).sum((-2, -1))
        slack = 1e-6 * torch.maximum(unit(cost, supply, demand), unit(other, supply, demand))
        assert (emd(other, supply, demand, solver=exact_solver) <= tangent + slack).all()

        a, b = (
            w + reach * w.sum(-1, True) * torch.rand(w.shape, generator=generator, dtype=w.dtype)
            for w in (supply, demand)
        )
        b = b * (a.sum(-1, True) / b.sum(-1, True))
        tangent = value + (by_supply * (a - supply)).sum(-1) + (by_demand * (b - demand)).sum(-1)
        slack = 1e-6 * torch.maximum(unit(cost, supply, demand), unit(cost, a, b))
        assert (emd(cost, a, b, solver=exact_solver) >= tangent - slack).all()


@given(data=st.data())
def test_the_gradient_is_between_the_one_sided_differences(
    data: st.DataObject, exact_solver: str, draw_problem: Callable[..., Problem]
) -> None:
    """At a kink they differ, and any gradient between them is one; elsewhere they are it."""
    cost, supply, demand = draw_problem(
        data, dtype=torch.float64, nodes=FEW_NODES, costs=("cosine", "quantised"), scales=0
    )
    cost.requires_grad_()
    value = emd(cost, supply, demand, solver=exact_solver)
    (flow,) = torch.autograd.grad(value.sum(), cost)
    direction = torch.randn(cost.shape, generator=seeded(data), dtype=cost.dtype)
    slope = (flow * direction).sum((-2, -1))
    h = 1e-3
    with torch.no_grad():
        above = emd(cost + h * direction, supply, demand, solver=exact_solver)
        below = emd(cost - h * direction, supply, demand, solver=exact_solver)
    slack = 2e-6 / h  # each value is off by at most 1e-6 of a cost range of about two
    assert ((above - value) / h <= slope + slack).all()
    assert ((value - below) / h >= slope - slack).all()


@given(data=st.data())
def test_batches_threads_and_strides_change_no_bit(
    data: st.DataObject, draw_problem: Callable[..., Problem]
) -> None:
    batch = data.draw(st.integers(1, 200), "batch")
    cost, supply, demand = draw_problem(data, batch=batch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        plan = solve(cost, supply, demand)
        torch.set_num_threads(data.draw(st.integers(2, 8), "threads"))
        assert equal(solve(cost, supply, demand), plan)
        assert equal(solve(cost.mT.contiguous().mT, supply.flip(-1).flip(-1), demand), plan)
    finally:
        torch.set_num_threads(before)
    alone = data.draw(st.integers(0, batch - 1), "alone")
    one = every_part(solve(cost[alone], supply[alone], demand[alone]))
    assert all(torch.equal(a, b[alone]) for a, b in zip(one, every_part(plan), strict=True))


@given(data=st.data())
def test_points_on_a_line(data: st.DataObject, exact_solver: str) -> None:
    """Against the closed form: the area between the two distribution functions."""
    generator = seeded(data)
    N, M = data.draw(NODES, "N"), data.draw(NODES, "M")
    x, y = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (N, M))
    a, b = (torch.rand(n, generator=generator, dtype=torch.float64) + 1e-3 for n in (N, M))
    cost = (x[:, None] - y).abs()
    value = solve(cost, a, b * (a.sum() / b.sum()), solver=exact_solver).value / a.sum()
    expected = wasserstein_distance(x.numpy(), y.numpy(), a.numpy(), b.numpy())
    assert abs(float(value) - expected) <= 1e-6 * float(cost.max())


@given(data=st.data())
def test_bounds_and_searches_agree_with_solving(
    data: st.DataObject, draw_problem: Callable[..., Problem], unit: Callable[..., Tensor]
) -> None:
    problem = draw_problem(data, batch=24)
    value = solve(*problem).value
    assert (lower_bound(*problem) - value <= 1e-6 * unit(*problem)).all()
    k = data.draw(st.integers(1, 12), "k")
    mass = problem[1].sum(-1, dtype=torch.float64).to(value.dtype)
    distance, index = (value / mass).view(2, 12).sort(dim=-1, stable=True)
    nearest = solve_top_k(*(part.unflatten(0, (2, 12)) for part in problem), k)
    if value.dtype == torch.float32:  # torch's sum of the mass may round otherwise in float64
        assert torch.equal(nearest.index, index[:, :k])
    torch.testing.assert_close(nearest.distance, distance[:, :k], rtol=1e-14, atol=0)


@given(data=st.data())
def test_unequal_totals(
    data: st.DataObject, draw_problem: Callable[..., Problem], unit: Callable[..., Tensor]
) -> None:
    """Both exact solvers agree, and equal totals are the balanced problem."""
    cost, supply, demand = draw_problem(data, dtype=torch.float64, nodes=FEW_NODES)
    share = 2.0 ** data.draw(st.floats(-4, 4), "log2 of the ratio")
    ours, other = (
        solve(cost, supply * share, demand, solver=name, partial=True)
        for name in ("simplex", "pot")
    )
    larger = unit(cost, torch.maximum(supply * share, supply), demand)
    assert ((ours.value - other.value).abs() <= 2e-6 * larger).all()
    flow = every_part(ours)[1]
    mass = torch.maximum(supply.sum(-1) * share, demand.sum(-1))
    moved = torch.minimum(supply.sum(-1) * share, demand.sum(-1))
    assert ((flow.sum((-2, -1)) - moved).abs() <= 1e-6 * mass).all()
    balanced = solve(cost, supply, demand, partial=True).value - solve(cost, supply, demand).value
    assert (balanced.abs() <= 2e-6 * unit(cost, supply, demand)).all()


TAME = ("cosine", "quantised", "duplicated", "negative")


@given(data=st.data())
def test_simplex_and_pot_agree(
    data: st.DataObject, draw_problem: Callable[..., Problem], unit: Callable[..., Tensor]
) -> None:
    problem = draw_problem(data)
    error = solve(*problem).value.double() - solve(*problem, solver="pot").value.double()
    assert (error.abs() <= 1e-6 * unit(*problem)).all()


@given(data=st.data())
def test_opencv_is_near(
    data: st.DataObject, draw_problem: Callable[..., Problem], unit: Callable[..., Tensor]
) -> None:
    problem = draw_problem(data, dtype=torch.float32, weights=WEIGHTS[:4], costs=TAME, scales=6)
    error = solve(*problem, solver="opencv").value - solve(*problem).value
    assert (error.abs() <= 2e-5 * unit(*problem)).all()


@given(data=st.data())
def test_the_interior_point_keeps_its_bound(
    data: st.DataObject, draw_problem: Callable[..., Problem], unit: Callable[..., Tensor]
) -> None:
    """Its plan minimises ``cost . x + strength / 2 |x|^2``, and no square here is above one."""
    problem = draw_problem(
        data, dtype=torch.float64, weights=WEIGHTS[:5], costs=TAME, scales=0, nodes=FEW_NODES
    )
    strength = 10.0 ** -data.draw(st.integers(2, 6), "log10 of the strength")
    error = solve(*problem, solver="qp", strength=strength).value - solve(*problem).value
    slack = 1e-6 * unit(*problem)
    assert (error >= -slack).all()
    assert (error <= strength / 2 + slack).all()


@given(data=st.data())
def test_sinkhorn_keeps_its_bound(
    data: st.DataObject, draw_problem: Callable[..., Problem], unit: Callable[..., Tensor]
) -> None:
    problem = draw_problem(
        data, dtype=torch.float64, weights=WEIGHTS[:5], costs=TAME, scales=0, nodes=FEW_NODES
    )
    options = {"epsilon": 0.2, "iterations": 20_000, "tolerance": 1e-8}
    error = solve(*problem, solver="sinkhorn", **options).value - solve(*problem).value
    slack = 1e-6 * unit(*problem)
    assert (error >= -slack).all()
    assert (error <= 0.2 * math.log(min(problem[0].shape[1:])) + slack).all()


def seeded(data: st.DataObject) -> torch.Generator:
    return torch.Generator().manual_seed(data.draw(SEEDS, "seed of the rest"))
