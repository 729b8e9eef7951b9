import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MeanShift, estimate_bandwidth
from support import structured_sets

from emd_retrieval.matching import EMDMatcher, cluster_nodes

METHODS = ["k_means", "mean_shift"]


@pytest.fixture
def groups(generator):
    """Sets of three well-separated groups with 5, 3 and 1 nodes, shuffled: sets, centres."""
    centers = 10 * torch.randn(4, 3, 6, generator=generator)
    nodes = centers.repeat_interleave(torch.tensor([5, 3, 1]), dim=1)
    nodes = nodes + 0.01 * torch.randn(nodes.shape, generator=generator)
    return nodes[:, torch.randperm(9, generator=generator)], centers


@pytest.mark.parametrize(("method", "options"), [("k_means", {}), ("mean_shift", {})])
def test_finds_the_groups(method, options, groups):
    sets, centers = groups
    budget = 3 if method == "k_means" else 5
    means, weights, counts = cluster_nodes(
        sets, method, clusters=budget, bandwidth=None if method == "k_means" else 0.3
    )
    assert means.shape == (4, budget, 6)
    assert counts.tolist() == [3] * 4
    torch.testing.assert_close(means[:, :3], centers, rtol=0, atol=0.03)
    torch.testing.assert_close(weights[:, :3], torch.tensor([[5, 3, 1]]).div(9).expand(4, 3))
    assert not means[:, 3:].any()
    assert not weights[:, 3:].any()


def test_means_and_sizes_are_scikit_learns(generator):
    sets = structured_sets(3, 12, 5, generator, parts=3)
    means, weights, counts = cluster_nodes(sets, "k_means", clusters=4, seed=3)
    for place, rows in enumerate(sets.double().numpy()):
        unit = rows / np.sqrt((rows**2).sum(1).mean())
        labels = KMeans(n_clusters=4, n_init=3, random_state=3).fit_predict(unit)
        expected = sorted(
            ((labels == k).mean(), *rows[labels == k].mean(0).round(5)) for k in range(4)
        )
        got = sorted(
            (float(w), *m.numpy().round(5))
            for w, m in zip(weights[place].double(), means[place].double(), strict=True)
        )
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert counts.tolist() == [4] * 3


@pytest.mark.parametrize("bandwidth", [1e-6, 0.5, 0.8, 1.1, 1e6, None])
def test_mean_shift_is_scikit_learns(bandwidth, generator):
    sets = structured_sets(40, 15, 6, generator, parts=4)
    _, weights, counts = cluster_nodes(sets, "mean_shift", clusters=15, bandwidth=bandwidth)
    seen = set()
    for place, rows in enumerate(sets.double().numpy()):
        unit = rows / np.sqrt((rows**2).sum(1).mean())
        radius = estimate_bandwidth(unit) if bandwidth is None else bandwidth
        labels = MeanShift(bandwidth=radius).fit_predict(unit)
        sizes = sorted(np.bincount(labels, minlength=15) / 15, reverse=True)
        np.testing.assert_allclose(weights[place], sizes, atol=1e-6)
        seen.add(len(np.unique(labels)))
        assert counts[place] == len(np.unique(labels))
    assert seen == {15} if bandwidth == 1e-6 else seen == {1} if bandwidth == 1e6 else len(seen) > 1


def test_mean_shift_above_the_budget_keeps_the_largest(groups):
    sets, centers = groups
    rows = sets[0].double().numpy()
    radius = 0.3 * np.sqrt((rows**2).sum(1).mean())
    assert len(MeanShift(bandwidth=radius).fit(rows).cluster_centers_) == 3
    means, weights, counts = cluster_nodes(sets[:1], "mean_shift", clusters=2, bandwidth=0.3)
    assert counts.tolist() == [2]
    assert weights.sum().item() == pytest.approx(1), "the third group's node went elsewhere"
    assert sorted((9 * weights[0]).round().int().tolist()) in ([3, 6], [4, 5])
    assert (means[0] - centers[0, :2]).norm(dim=1).min() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_fewer_distinct_nodes_than_clusters(method):
    sets = torch.tensor([[[1.0, 2.0]] * 3, [[1.0, 2.0], [1.0, 2.0], [3.0, 0.0]]])
    means, weights, counts = cluster_nodes(sets, method, clusters=3)
    assert counts.tolist() in ([1, 2], [1, 1])
    torch.testing.assert_close(means[0, 0], torch.tensor([1.0, 2.0]))
    assert weights[0].tolist() == [1, 0, 0]
    zeros = cluster_nodes(torch.zeros(1, 4, 2), method, clusters=2)
    assert zeros.weights.tolist() == [[1, 0]]


@pytest.mark.parametrize("method", METHODS)
def test_repeats_and_scale(method, generator):
    sets = structured_sets(3, 10, 6, generator)
    first, again = cluster_nodes(sets, method), cluster_nodes(sets.clone(), method)
    scaled = cluster_nodes(sets * 64, method)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(scaled.nodes, 64 * first.nodes)
    assert torch.equal(scaled.weights, first.weights)


def test_means_are_differentiable(generator):
    sets = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cluster_nodes(x, "k_means", clusters=2).nodes, sets)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ground_cost", ["cosine", "snr"])
def test_matcher_layouts_agree(method, ground_cost, generator):
    sets = structured_sets(6, 10, 8, generator)
    matcher = EMDMatcher(weights=method, clusters=4, ground_cost=ground_cost)
    full = matcher.all_pairs(sets)
    torch.testing.assert_close(full.diagonal(), torch.ones(6), rtol=0, atol=1e-5)
    candidates = torch.randint(6, (6, 3), generator=generator)
    gallery = matcher.prepare(sets)
    assert gallery.ground.shape[1] == 4
    assert torch.equal(gallery.nodes, sets), "the features as they were: a shortlist needs them"
    torch.testing.assert_close(
        matcher.shortlist(sets, gallery, candidates), full.gather(1, candidates), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        matcher.paired(sets, sets.flip(0)), full.flip(1).diagonal(), rtol=0, atol=1e-5
    )
    match = matcher.match(sets[:2], sets[2:4])
    means = cluster_nodes(sets[:2], method, clusters=4)
    torch.testing.assert_close(match.flow.sum(2), means.weights, rtol=0, atol=1e-6)


def test_refuses_bad_input():
    sets = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match=r"method: expected one of .*did you mean 'k_means'"):
        cluster_nodes(sets, "kmeans")
    with pytest.raises(ValueError, match="clusters: expected a positive number, got 0"):
        cluster_nodes(sets, "k_means", clusters=0)
    with pytest.raises(ValueError, match="clusters: expected an integer"):
        EMDMatcher(weights="k_means", clusters=2.5)
    with pytest.raises(ValueError, match="bandwidth: expected a positive number"):
        EMDMatcher(weights="mean_shift", bandwidth=-1)
    with pytest.raises(ValueError, match="sets: expected finite values"):
        cluster_nodes(sets + torch.nan, "k_means")
    with pytest.raises(ValueError, match="sets: expected at least one node"):
        cluster_nodes(sets[:, :0], "k_means")
