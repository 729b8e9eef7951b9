import dataclasses

import cv2
import numpy as np
import pytest
import torch
from support import structured_sets

from emd_retrieval.matching import EMDMatcher, cross_reference_weights


def opencv_similarity(query, reference, floor):
    """Equations 2, 3, 11, 12 in plain loops, solved by OpenCV."""
    q, r = query.double().numpy(), reference.double().numpy()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, r)]
    cost = (1 - unit[0] @ unit[1].T).astype(np.float32)
    supply = np.maximum(q @ r.mean(0), 0) + floor
    demand = np.maximum(r @ q.mean(0), 0) + floor
    supply, demand = (np.float32(w / w.sum())[:, None] for w in (supply, demand))
    _, _, flow = cv2.EMD(supply, demand, cv2.DIST_USER, cost)
    return float(((1 - cost) * flow).sum() / flow.sum())


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 9), (14, 14)])
def test_paired_matches_plain_loops_with_opencv(n, m, generator):
    query = structured_sets(8, n, 16, generator)
    reference = structured_sets(8, m, 16, generator)
    matcher = EMDMatcher(weight_floor_scale="absolute")
    got = matcher.paired(query, reference)
    for i in range(8):
        expected = opencv_similarity(query[i], reference[i], 1e-3)
        assert got[i].item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("memory_mb", [32, 0.01])
def test_layouts_agree(memory_mb, generator):
    """All pairs, symmetric halves, shortlists and pairs are four ways to the same number."""
    matcher = EMDMatcher(memory_mb=memory_mb)
    sets = structured_sets(9, 6, 8, generator)
    halves = matcher.all_pairs(sets)
    full = matcher.all_pairs(sets, sets.clone())
    torch.testing.assert_close(halves, full, rtol=0, atol=1e-6)
    assert torch.equal(halves, halves.mT)
    candidates = torch.randint(9, (9, 4), generator=generator)
    torch.testing.assert_close(
        matcher.shortlist(sets, sets, candidates), full.gather(1, candidates), rtol=0, atol=1e-6
    )
    for i in range(9):
        row = matcher.paired(sets[i].expand_as(sets), sets)
        torch.testing.assert_close(row, full[i], rtol=0, atol=1e-6)


def test_sets_of_different_sizes_meet(generator):
    query, reference = structured_sets(3, 4, 8, generator), structured_sets(5, 7, 8, generator)
    similarity = EMDMatcher().all_pairs(query, reference)
    assert similarity.shape == (3, 5)
    torch.testing.assert_close(EMDMatcher().all_pairs(reference, query), similarity.mT)


@pytest.mark.parametrize("ground_cost", ["cosine", "centered_cosine"])
@pytest.mark.parametrize("weights", ["cross_reference", "uniform"])
def test_similarity_is_one_with_itself_and_bounded(ground_cost, weights, generator):
    matcher = EMDMatcher(ground_cost=ground_cost, weights=weights)
    sets = torch.randn(6, 5, 8, generator=generator)
    similarity = matcher.all_pairs(sets)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(6))
    assert similarity.min() >= -1
    assert similarity.max() <= 1 + 1e-6


def test_order_of_nodes_does_not_matter(generator):
    query, reference = structured_sets(4, 6, 8, generator), structured_sets(4, 6, 8, generator)
    shuffled = reference[:, torch.randperm(6, generator=generator)]
    torch.testing.assert_close(
        EMDMatcher().paired(query, shuffled), EMDMatcher().paired(query, reference)
    )


@pytest.mark.parametrize("scale", [1e-3, 37.0])
def test_scale_of_features_does_not_matter(scale, generator):
    query, reference = structured_sets(4, 6, 8, generator), structured_sets(4, 6, 8, generator)
    torch.testing.assert_close(
        EMDMatcher().paired(query * scale, reference),
        EMDMatcher().paired(query, reference),
        rtol=1e-4,
        atol=1e-6,
    )


def test_match_explains_the_similarity(generator):
    query, reference = structured_sets(3, 4, 8, generator), structured_sets(3, 5, 8, generator)
    match = EMDMatcher().match(query, reference)
    torch.testing.assert_close(match.similarity, EMDMatcher().paired(query, reference))
    torch.testing.assert_close((match.flow * (1 - match.cost)).sum((1, 2)), match.similarity)
    torch.testing.assert_close(match.flow.sum(2), match.query_weights)
    torch.testing.assert_close(match.flow.sum(1), match.reference_weights)


@pytest.mark.parametrize("weights", ["cross_reference", "uniform"])
def test_gradient_of_pairs(weights, generator):
    query = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    matcher = EMDMatcher(weights=weights)
    # The native solver rounds costs to integers, so finite differences carry its rounding.
    assert torch.autograd.gradcheck(matcher.paired, (query, reference), eps=1e-4, atol=1e-3)


def test_gradient_among_themselves_is_that_of_the_full_grid(generator):
    sets = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matcher = EMDMatcher()
    gradients = []
    for among in (True, False):
        leaf = sets.clone().requires_grad_()
        other = leaf if among else leaf.clone()
        (matcher.all_pairs(leaf, other) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_lower_the_precision(generator):
    sets = structured_sets(4, 6, 8, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = EMDMatcher().all_pairs(sets)
    assert torch.equal(inside, EMDMatcher().all_pairs(sets))


def test_half_precision_sets_are_raised(generator):
    sets = structured_sets(4, 6, 8, generator)
    half = EMDMatcher().all_pairs(sets.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, EMDMatcher().all_pairs(sets), rtol=0, atol=0.02)


def test_empty_inputs(generator):
    sets = structured_sets(3, 4, 8, generator)
    matcher = EMDMatcher()
    assert matcher.all_pairs(sets[:0]).shape == (0, 0)
    assert matcher.all_pairs(sets, sets[:0]).shape == (3, 0)
    assert matcher.all_pairs(sets[:0], sets).shape == (0, 3)
    assert matcher.shortlist(sets[:0], sets, torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2)
    assert matcher.shortlist(sets, sets, torch.zeros(3, 0, dtype=torch.long)).shape == (3, 0)
    assert matcher.paired(sets[:0], sets[:0]).shape == (0,)


@pytest.mark.parametrize("weights", ["uniform", "cross_reference"])
def test_dense_coupling_in_plain_loops(weights, generator):
    """Table 2 without EMD: every node with every node, by the product of the weights."""
    query, reference = structured_sets(3, 4, 8, generator), structured_sets(2, 5, 8, generator)
    matcher = EMDMatcher(coupling="dense", weights=weights)
    got = matcher.all_pairs(query, reference)
    for i, q in enumerate(query):
        for j, r in enumerate(reference):
            if weights == "uniform":
                supply, demand = torch.full((4,), 1 / 4), torch.full((5,), 1 / 5)
            else:
                supply, demand = cross_reference_weights(q, r)
            expected = sum(
                supply[a] * demand[b] * torch.cosine_similarity(q[a], r[b], dim=0)
                for a in range(4)
                for b in range(5)
            )
            torch.testing.assert_close(got[i, j], expected)
    torch.testing.assert_close(matcher.paired(query[:2], reference), got[:2].diagonal())
    match = matcher.match(query[:2], reference)
    torch.testing.assert_close((match.flow * (1 - match.cost)).sum((1, 2)), match.similarity)
    among = matcher.all_pairs(query)
    torch.testing.assert_close(among, matcher.all_pairs(query, query.clone()))
    rows = torch.tensor([[1, 0], [0, 0], [1, 1]])
    torch.testing.assert_close(matcher.shortlist(query, reference, rows), got.gather(1, rows))


@pytest.mark.parametrize("coupling", ["transport", "dense"])
def test_weights_without_gradient(coupling, generator):
    """As in the reference code: the value stays, the gradient is that of constant weights."""
    query = structured_sets(3, 4, 8, generator).requires_grad_()
    reference = structured_sets(3, 5, 8, generator)
    detached = EMDMatcher(coupling=coupling, weight_gradient=False)
    exact = EMDMatcher(coupling=coupling)
    torch.testing.assert_close(
        detached.paired(query, reference), exact.paired(query, reference), rtol=0, atol=0
    )
    detached.paired(query, reference).sum().backward()
    match = exact.match(query.detach(), reference)
    constant = query.detach().clone().requires_grad_()
    cosine = torch.nn.functional.normalize(constant, dim=-1) @ (
        torch.nn.functional.normalize(reference, dim=-1).mT
    )
    (match.flow * cosine).sum().backward()
    torch.testing.assert_close(query.grad, constant.grad)


def test_snr_is_not_symmetric_and_zero_with_itself(generator):
    sets = structured_sets(5, 4, 8, generator)
    matcher = EMDMatcher(ground_cost="snr")
    assert not matcher.symmetric
    value = 1 - matcher.all_pairs(sets)
    torch.testing.assert_close(value.diagonal(), torch.zeros(5), rtol=0, atol=1e-5)
    assert (value - value.mT).abs().max() > 1e-3
    assert value.min() > -1e-5
    torch.testing.assert_close(value, 1 - matcher.all_pairs(sets, sets.clone()))


def test_describe_holds_every_setting():
    fields = {field.name for field in dataclasses.fields(EMDMatcher)} - {"memory_mb"}
    assert set(EMDMatcher().describe()) == fields
    assert EMDMatcher(**EMDMatcher(clusters=3).describe()) == EMDMatcher(clusters=3)


@pytest.mark.parametrize("settings", [{}, {"weights": "uniform"}, {"coupling": "dense"}], ids=str)
def test_overflow_is_told_as_what_it_is(settings, generator):
    sets = structured_sets(3, 4, 8, generator)
    matcher = EMDMatcher(**settings)
    for call in (
        lambda: matcher.all_pairs(1e25 * sets),
        lambda: matcher.paired(sets, 1e25 * sets),
        lambda: matcher.all_pairs((1e25 * sets).requires_grad_()),
    ):
        with pytest.raises(ValueError, match=r"query, reference: expected features whose products"):
            call()
    large = matcher.all_pairs(1e25 * sets.double())
    torch.testing.assert_close(large.float(), matcher.all_pairs(sets), rtol=0, atol=1e-6)


def test_refuses_bad_input(generator):
    sets = structured_sets(3, 4, 8, generator)
    matcher = EMDMatcher()
    with pytest.raises(ValueError, match=r"reference: expected shape \[R, M, D\], with D = 8"):
        matcher.all_pairs(sets, sets[..., :5])
    with pytest.raises(ValueError, match="at least one node and channel"):
        matcher.all_pairs(sets[:, :0])
    with pytest.raises(ValueError, match="expected the leading dimensions of query"):
        matcher.paired(sets, sets[:2])
    with pytest.raises(ValueError, match="candidates: expected rows of reference, 0 to 2"):
        matcher.shortlist(sets, sets, torch.tensor([[0, 3]] * 3))
    with pytest.raises(TypeError, match="candidates: expected an integer tensor"):
        matcher.shortlist(sets, sets, torch.zeros(3, 2))
    sets[1, 2, 3] = float("nan")
    with pytest.raises(
        ValueError,
        match=r"query: expected finite values, got 1 .* first is NaN at index \[1, 2, 3\]",
    ):
        matcher.all_pairs(sets)
    with pytest.raises(ValueError, match="memory_mb: expected a positive number"):
        EMDMatcher(memory_mb=0)
    with pytest.raises(ValueError, match="did you mean 'simplex'"):
        EMDMatcher(solver="simplx")
    with pytest.raises(ValueError, match="did you mean 'dense'"):
        EMDMatcher(coupling="dens")
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        EMDMatcher(ground_cost="cosinus")


@pytest.mark.parametrize("weights", ["k_means", "mean_shift"])
def test_a_single_pair_of_clustered_sets(weights, generator):
    matcher = EMDMatcher(weights=weights, clusters=3)
    query, reference = structured_sets(2, 8, 4, generator)
    match = matcher.match(query, reference)
    batched = matcher.match(query[None], reference[None])
    assert torch.equal(match.similarity, batched.similarity[0])
    assert torch.equal(match.flow, batched.flow[0])
