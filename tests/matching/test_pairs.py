import pytest
import torch
from support import structured_sets

from emd_retrieval.matching import EMDMatcher, PairPlans
from emd_retrieval.matching import pairs as pairs_module
from emd_retrieval.matching.pairs import rectangles, upper_half


class ComposedMatcher(EMDMatcher):
    """The same similarities by plain autograd through costs, weights and ``emd``."""

    @property
    def _keeps_plans(self):
        return False


SETTINGS = [
    {},
    {"ground_cost": "centered_cosine", "weight_floor_scale": "absolute"},
    {"ground_cost": "snr"},
    {"weights": "uniform"},
    {"weights": "k_means", "clusters": 3},
    {"weight_gradient": False},
    {"solver": "pot"},
]


@pytest.mark.parametrize("memory_mb", [32, 0.004])
@pytest.mark.parametrize("among", [True, False], ids=["among", "two sides"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradient_by_hand_is_that_of_autograd(settings, among, memory_mb, generator):
    query = structured_sets(7, 4, 8, generator).double()
    reference = structured_sets(5, 6, 8, generator).double()
    upstream = torch.randn(7, 7 if among else 5, generator=generator, dtype=torch.float64)
    results = []
    for kind in (EMDMatcher, ComposedMatcher):
        matcher = kind(**settings, memory_mb=memory_mb)
        sides = [query.clone().requires_grad_(), reference.clone().requires_grad_()]
        matrix = matcher.all_pairs(sides[0], None if among else sides[1])
        (matrix * upstream).sum().backward()
        results.append([matrix.detach(), sides[0].grad] + ([] if among else [sides[1].grad]))
    for by_hand, composed in zip(*results, strict=True):
        # The simplex compares costs as integers: where plans tie within 2^-25, either may win.
        torch.testing.assert_close(by_hand, composed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ground_cost", ["cosine", "snr"])
def test_gradient_against_finite_differences(ground_cost, generator):
    query = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    matcher = EMDMatcher(ground_cost=ground_cost, solver="pot")
    assert torch.autograd.gradcheck(matcher.all_pairs, (query, reference), eps=1e-6, atol=1e-4)
    assert torch.autograd.gradcheck(matcher.all_pairs, (query,), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("one_side", ["query", "reference"])
def test_gradient_of_one_side_alone(one_side, generator):
    sides = {
        "query": structured_sets(4, 3, 8, generator),
        "reference": structured_sets(5, 3, 8, generator),
    }
    sides[one_side].requires_grad_()
    matcher = EMDMatcher()
    matcher.all_pairs(**sides).square().sum().backward()
    (alone,) = (side.grad for side in sides.values() if side.grad is not None)
    both = {name: side.detach().clone().requires_grad_() for name, side in sides.items()}
    matcher.all_pairs(**both).square().sum().backward()
    torch.testing.assert_close(alone, both[one_side].grad)


@pytest.fixture
def solved(monkeypatch):
    """Counts the problems that the engine gives to a solver."""
    counts = []

    def count(cost, *others, **options):
        counts.append(len(cost))
        return solve(cost, *others, **options)

    solve = pairs_module.solve
    monkeypatch.setattr(pairs_module, "solve", count)
    return counts


@pytest.mark.parametrize("among", [True, False])
def test_plans_are_used_in_place_of_solving(among, solved, generator):
    query = structured_sets(6, 4, 8, generator).requires_grad_()
    reference = None if among else structured_sets(5, 4, 8, generator)
    matcher, plans = EMDMatcher(), PairPlans()
    with torch.no_grad():
        first = matcher.all_pairs(query, reference, plans=plans)
    assert plans.filled
    assert sum(solved) == (21 if among else 30)
    kept = first.clone()
    first.fill_(torch.nan)  # as miners do
    second = matcher.all_pairs(query, reference, plans=plans)
    assert sum(solved) == (21 if among else 30), "solved again"
    assert torch.equal(second, kept)
    second.square().sum().backward()
    from_plans, query.grad = query.grad, None
    matcher.all_pairs(query, reference).square().sum().backward()
    torch.testing.assert_close(from_plans, query.grad)


def test_plans_stay_empty_without_an_exact_coupling(generator):
    sets = structured_sets(4, 3, 8, generator)
    for settings in ({"coupling": "dense"}, {"solver": "sinkhorn"}, {"solver": "opencv"}):
        plans = PairPlans()
        EMDMatcher(**settings).all_pairs(sets, plans=plans)
        assert not plans.filled


@pytest.mark.parametrize("solver", ["sinkhorn", "qp"])
def test_halves_of_composed_solvers(solver, generator):
    sets = structured_sets(5, 3, 8, generator).double().requires_grad_()
    matcher = EMDMatcher(solver=solver, memory_mb=0.001)
    halves = matcher.all_pairs(sets)
    full = matcher.all_pairs(sets, sets.clone())
    assert torch.equal(halves, halves.mT)
    torch.testing.assert_close(halves, full, rtol=0, atol=3e-3)


def test_second_derivatives_are_refused(generator):
    sets = structured_sets(3, 3, 8, generator).requires_grad_()
    value = EMDMatcher().all_pairs(sets).sum()
    with pytest.raises(RuntimeError, match="cannot itself be differentiated"):
        torch.autograd.grad(value, sets, create_graph=True)


@pytest.mark.parametrize("pairs", [1, 3, 10, 64, 1000])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_blocks_cover_every_pair_once(size, pairs):
    half = torch.zeros(size, size, dtype=torch.int64)
    for block in upper_half(size, pairs):
        ones = torch.ones(block.count, dtype=torch.int64)
        spread = block.spread(ones, block.flat(ones.device))
        assert torch.equal(block.take(spread, block.flat(ones.device)), ones)
        assert block.count <= max(pairs, block.shape[0])
        half[block.rows, block.cols] += spread
    assert (half.triu() == torch.ones(size, size).triu()).all()
    whole = torch.zeros(size, 5, dtype=torch.int64)
    for block in rectangles(size, 5, pairs):
        assert block.count <= max(pairs, 1)
        whole[block.rows, block.cols] += 1
    assert (whole == 1).all()
