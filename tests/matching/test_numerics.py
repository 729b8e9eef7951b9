"""Features as they really come: in half precision, without norm, all alike, of any scale."""

from __future__ import annotations

import importlib

import pytest
import torch
from support import structured_sets

from emd_retrieval.matching import EMDMatcher, ground_cost
from emd_retrieval.matching.ground_costs import least_norm

# The package's attribute of that name is the function.
solve_module = importlib.import_module("emd_retrieval.transport.solve")

MATCHERS = {
    f"{cost}, {weights}, {coupling}": EMDMatcher(
        ground_cost=cost, weights=weights, coupling=coupling
    )
    for cost in ("cosine", "centered_cosine")
    for weights in ("cross_reference", "uniform", "k_means", "mean_shift")
    for coupling in ("transport", "dense")
} | {
    "snr": EMDMatcher(ground_cost="snr"),
    "absolute floor": EMDMatcher(weight_floor_scale="absolute"),
    "no floor": EMDMatcher(weight_floor=0.0),
}


@pytest.fixture(params=MATCHERS)
def matcher(request):
    return MATCHERS[request.param]


def awkward_sets(kind, generator):
    """Five sets of six nodes."""
    sets = structured_sets(5, 6, 8, generator)
    match kind:
        case "some zero nodes":
            sets[:, ::2] = 0
        case "a zero set":
            sets[1] = 0
        case "all zero":
            sets = torch.zeros_like(sets)
        case "all nodes equal":
            sets = sets[:1, :1].expand_as(sets).clone()
        case "all channels equal":
            sets = torch.full_like(sets, 0.3)
        case "opposite":
            sets[1] = -sets[0]
        case "nothing relevant":
            sets[:2] = -sets[2:3].mean(1, keepdim=True)
        case "one huge node":
            sets[:, 0] *= 1e12
        case "one tiny node":
            sets[:, 0] *= 1e-15
    return sets


KINDS = (
    *("some zero nodes", "a zero set", "all zero", "all nodes equal", "all channels equal"),
    *("opposite", "nothing relevant", "one huge node", "one tiny node"),
)


def assert_in_range(matcher, similarity):
    assert torch.isfinite(similarity).all()
    assert similarity.max() <= 1 + 1e-5
    if matcher.symmetric:  # snr costs have no upper bound
        assert similarity.min() >= -1 - 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_awkward_features_stay_in_range(matcher, kind, generator):
    sets = awkward_sets(kind, generator)
    rows = torch.arange(5).expand(5, 5)
    match = matcher.match(sets, sets.flip(0))
    for similarity in (
        matcher.all_pairs(sets),
        matcher.paired(sets, sets.flip(0)),
        matcher.shortlist(sets, sets, rows),
        match.similarity,
    ):
        assert_in_range(matcher, similarity)
    for weights in (match.query_weights, match.reference_weights):
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    torch.testing.assert_close(
        matcher.shortlist(sets, sets, rows),
        matcher.all_pairs(sets, sets.clone()),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ground_cost", ["cosine", "centered_cosine", "snr"])
@pytest.mark.parametrize("coupling", ["transport", "dense"])
def test_awkward_features_have_finite_gradients(ground_cost, coupling, kind, generator):
    for floor in ("relative", "absolute"):
        matcher = EMDMatcher(ground_cost=ground_cost, coupling=coupling, weight_floor_scale=floor)
        sets = awkward_sets(kind, generator).requires_grad_()
        (matcher.all_pairs(sets).sum() + matcher.paired(sets, sets.flip(0)).sum()).backward()
        assert torch.isfinite(sets.grad).all()


@pytest.mark.parametrize("coupling", ["transport", "dense"])
def test_a_set_without_norm_has_similarity_zero(coupling, generator):
    """Cosine with a zero node counts as 0, with itself too."""
    sets = awkward_sets("a zero set", generator)
    similarity = EMDMatcher(coupling=coupling).all_pairs(sets)
    torch.testing.assert_close(similarity[1], torch.zeros(5), rtol=0, atol=1e-6)


def test_where_no_node_is_relevant_all_weigh_the_same(generator):
    """Every weight is the floor, or nothing at all without one."""
    query = structured_sets(3, 6, 8, generator).abs()
    for floor in (1e-3, 0.0):
        match = EMDMatcher(weight_floor=floor).match(query, -query)
        torch.testing.assert_close(match.query_weights, torch.full((3, 6), 1 / 6))
        torch.testing.assert_close(match.reference_weights, torch.full((3, 6), 1 / 6))
        assert_in_range(EMDMatcher(), match.similarity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_anything_else(matcher, dtype, generator):
    half = structured_sets(5, 6, 8, generator).to(dtype)
    expected = matcher.all_pairs(half.float())
    assert expected.dtype == torch.float32
    assert torch.equal(matcher.all_pairs(half), expected)
    assert torch.equal(
        matcher.paired(half, half.flip(0)), matcher.paired(half.float(), half.flip(0).float())
    )
    assert_in_range(matcher, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_come_back_in_half_precision(dtype, generator):
    half = structured_sets(3, 5, 8, generator).to(dtype).requires_grad_()
    EMDMatcher().all_pairs(half).sum().backward()
    assert half.grad.dtype == dtype
    assert torch.isfinite(half.grad).all()


# Mean-shift takes the distance of some neighbours for its radius, so they lie on its very edge:
# only a power of two keeps them there.
@pytest.mark.parametrize("exponent", [-20, 20, 40])
def test_similarities_do_not_see_powers_of_two(matcher, exponent, generator):
    if matcher.weight_floor_scale == "absolute":
        return  # the one setting that knows a scale
    sets = structured_sets(5, 6, 8, generator)
    expected = matcher.all_pairs(sets)
    # Not to the bit: a weight of zero is raised to the least number that a sum bears.
    torch.testing.assert_close(matcher.all_pairs(sets * 2.0**exponent), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", ["cross_reference", "uniform"])
def test_vanishing_features_count_as_zero(weights, dtype, generator):
    """On the way there similarities stay in range; weights become equal when products underflow."""
    sets = structured_sets(4, 6, 8, generator).to(dtype)
    matcher = EMDMatcher(weights=weights)
    for part in range(1, 60):
        scale = float(torch.finfo(dtype).smallest_normal) ** (part / 50)
        similarity = matcher.all_pairs(sets * scale)
        assert_in_range(matcher, similarity)
        norms = (sets * scale).double().norm(dim=-1)
        if norms.min() > least_norm(dtype):
            torch.testing.assert_close(similarity.diagonal(), torch.ones(4, dtype=dtype))
        elif norms.max() < least_norm(dtype):
            assert similarity.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["cosine", "centered_cosine"])
def test_costs_of_half_precision_stay_in_range(name, generator):
    for dtype in (torch.float16, torch.bfloat16):
        nodes = torch.randn(50, 640, generator=generator).to(dtype)
        nodes[3] = 0
        cost = ground_cost(name)(nodes, nodes).float()
        assert torch.isfinite(cost).all()
        slack = 4 * torch.finfo(dtype).eps
        assert cost.min() >= -slack
        assert cost.max() <= 2 + slack


@pytest.fixture
def dtypes_solved(monkeypatch):
    """Dtypes of every problem that reaches a solver."""
    seen = set()
    load = solve_module._load

    def recording(solver):
        function = load(solver)

        def call(cost, supply, demand, **options):
            seen.update((cost.dtype, supply.dtype, demand.dtype))
            return function(cost, supply, demand, **options)

        return call

    monkeypatch.setattr(solve_module, "_load", recording)
    return seen


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["simplex", "pot", "opencv", "sinkhorn", "qp"])
def test_solvers_get_float32_or_float64(autocast, features, solver, dtypes_solved, generator):
    sets = structured_sets(3, 4, 8, generator).to(features).requires_grad_()
    detached = solver == "opencv"  # it has no gradient for weights
    matcher = EMDMatcher(solver=solver, weight_gradient=not detached)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        matcher.all_pairs(sets).sum().backward()
        matcher.paired(sets, sets.flip(0)).sum().backward()
        matcher.shortlist(sets, sets, torch.tensor([[0, 1]] * 3)).sum().backward()
    assert dtypes_solved == {torch.float64 if features == torch.float64 else torch.float32}
    assert torch.isfinite(sets.grad).all()


def test_loss_scaling_scales_the_gradient_and_nothing_else(dtypes_solved, generator):
    """A loss scale is a power of two: unscaled gradients are those without it, to the bit."""
    sets = structured_sets(4, 5, 8, generator)
    layer = torch.nn.Linear(8, 8, bias=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            features = layer(sets)
            assert features.dtype == torch.bfloat16
            return (1 - EMDMatcher().all_pairs(features)).square().mean()

    loss().backward()
    expected = layer.weight.grad.clone()
    optimizer.zero_grad()
    scaled = scaler.scale(loss())
    scaled.backward()
    scaler.unscale_(optimizer)
    assert torch.equal(layer.weight.grad, expected)
    before = layer.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(layer.weight, before), "the step was skipped as if it had overflowed"
    assert scaler.get_scale() == 2.0**16
    assert dtypes_solved == {torch.float32}
