"""The re-ranker: against the matcher, pruned against not, and what it refuses."""

import numpy as np
import pytest
import torch
from support import structured_sets

from emd_retrieval.features import pack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import EMDReranker, LocalFeatureStore

COUNT, NODES, CHANNELS = 80, 9, 16


@pytest.fixture
def sets(generator):
    return structured_sets(COUNT, NODES, CHANNELS, generator).relu()


@pytest.fixture
def queries(generator):
    return structured_sets(5, 7, CHANNELS, generator).relu()


@pytest.fixture
def store(tmp_path, sets):
    return numbered(tmp_path / "n.store", sets)


@pytest.fixture
def candidates(generator):
    return torch.stack([torch.randperm(COUNT, generator=generator)[:40] for _ in range(5)]) + 100


def numbered(path, sets, codec="float32"):
    with LocalFeatureStore.create(
        path, channels=CHANNELS, nodes=sets.shape[1], codec=codec
    ) as writer:
        writer.append(np.arange(len(sets)) + 100, sets)
    return LocalFeatureStore.open(path)


def everything(sets, queries, candidates, **settings):
    """Similarities of all candidates by the matcher."""
    return EMDMatcher(**settings).shortlist(queries, sets, candidates - 100)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": "uniform"},
        {"ground_cost": "centered_cosine"},
        {"ground_cost": "snr"},
        {"solver": "pot"},
        {"solver": "sinkhorn"},
        {"coupling": "dense"},
        {"weights": "k_means", "clusters": 3},
    ],
    ids=str,
)
def test_it_ranks_as_the_matcher_does(store, sets, queries, candidates, settings):
    matcher = EMDMatcher(**settings)
    found = EMDReranker(store, matcher).rerank(queries, candidates, k=6)
    expected = everything(sets, queries, candidates, **settings)
    best, place = expected.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.ids, candidates.gather(1, place)[:, :6])
    # Sinkhorn's iterations end when a whole batch has converged.
    atol = 1e-4 if settings.get("solver") == "sinkhorn" else 3e-6
    torch.testing.assert_close(found.similarities, best[:, :6].float(), rtol=0, atol=atol)
    assert torch.equal(found.scores, found.similarities)


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.05])
@pytest.mark.parametrize("solver", ["simplex", "pot"])
def test_pruning_changes_nothing(tmp_path, sets, queries, candidates, codec, alpha, solver):
    store = numbered(tmp_path / codec, sets, codec)
    scores = torch.rand(candidates.shape, generator=torch.Generator().manual_seed(3))
    matcher = EMDMatcher(solver=solver)
    first = EMDReranker(store, matcher).rerank(queries, candidates, scores, 10, alpha=alpha)
    again = EMDReranker(store, matcher).rerank(queries, candidates, scores, 10, alpha=alpha)
    whole = EMDReranker(store, matcher, prune=False).rerank(
        queries, candidates, scores, 10, alpha=alpha
    )
    # Sets that were held against their checksums take another way through the native core.
    for pruned in (first, again):
        assert torch.equal(pruned.ids, whole.ids)
        assert torch.equal(pruned.similarities, whole.similarities)
        assert torch.equal(pruned.scores, whole.scores)
        assert whole.solved == whole.compared == candidates.numel()
        if solver == "simplex":
            assert pruned.solved < whole.solved
            assert pruned.skipped == 1 - pruned.solved / candidates.numel()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_scores_mix_both_stages(store, sets, queries, candidates, alpha):
    scores = torch.rand(candidates.shape, generator=torch.Generator().manual_seed(4))
    found = EMDReranker(store).rerank(queries, candidates, scores, k=40, alpha=alpha)
    mixed = alpha * everything(sets, queries, candidates) + (1 - alpha) * scores
    best, place = mixed.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.ids, candidates.gather(1, place))
    torch.testing.assert_close(found.scores, best, rtol=0, atol=3e-6)


def test_numpy_in_numpy_out_and_packed_sets(store, queries, candidates):
    by_tensor = EMDReranker(store).rerank(queries, candidates, k=3)
    by_array = EMDReranker(store).rerank(
        pack(queries).numpy(), candidates.numpy(), candidates.float().numpy(), 3
    )
    for name in ("ids", "similarities", "scores"):
        assert isinstance(getattr(by_tensor, name), torch.Tensor)
        assert isinstance(getattr(by_array, name), np.ndarray)
        np.testing.assert_array_equal(getattr(by_array, name), getattr(by_tensor, name).numpy())


def test_chunks_and_batches_are_the_same_as_one_by_one(store, queries, candidates):
    whole = EMDReranker(store).rerank(queries, candidates, k=4)
    small = EMDReranker(store, memory_mb=0.001).rerank(queries, candidates, k=4)
    assert torch.equal(whole.ids, small.ids)
    assert torch.equal(whole.similarities, small.similarities)
    for row in range(len(queries)):
        one = EMDReranker(store).rerank(queries[row : row + 1], candidates[row : row + 1], k=4)
        assert torch.equal(one.ids[0], whole.ids[row])


@pytest.mark.parametrize("settings", [{}, {"ground_cost": "snr"}, {"coupling": "dense"}], ids=str)
def test_absent_candidates_come_last(store, sets, queries, candidates, settings):
    short = candidates.clone()
    short[0, 2:] = -1
    short[1, 0] = -1
    short[2] = -1
    reranker = EMDReranker(store, EMDMatcher(**settings))
    for scores, alpha in ((None, 1.0), (torch.ones(5, 40), 0.5)):
        found = reranker.rerank(queries, short, scores, k=5, alpha=alpha, return_flows=True)
        assert (found.ids[0, 2:] == -1).all()
        assert set(found.ids[0, :2].tolist()) == set(short[0, :2].tolist())
        assert found.similarities[0, 2:].eq(-torch.inf).all()
        assert found.scores[0, 2:].eq(-torch.inf).all()
        assert not found.flows[0, 2:].any()
        assert (found.ids[1] > 0).all()
        assert found.ids[2].tolist() == [-1] * 5
        assert found.compared == 2 + 39 + 0 + 80
    assert reranker.similarities(queries, short)[2].tolist() == [-np.inf] * 40


@pytest.mark.parametrize("ground_cost", ["cosine", "centered_cosine"])
@pytest.mark.parametrize("nodes", [NODES, None])
def test_queries_without_any_candidate(tmp_path, sets, queries, ground_cost, nodes):
    path = tmp_path / "v.store"
    with LocalFeatureStore.create(path, channels=CHANNELS, nodes=nodes) as writer:
        writer.append(range(COUNT), sets)
    reranker = EMDReranker(LocalFeatureStore.open(path), EMDMatcher(ground_cost=ground_cost))
    for alpha in (0.0, 0.5, 1.0):
        found = reranker.rerank(
            queries[:1], [[-1, -1, -1]], np.zeros((1, 3)), np.int64(2), alpha=alpha
        )
        assert found.ids.tolist() == [[-1, -1]]
        assert found.scores.tolist() == [[-np.inf, -np.inf]]
        assert (found.compared, found.solved) == (0, 0)


@pytest.mark.filterwarnings("error")
def test_short_rows_by_the_first_stage_alone_give_no_warning(store, queries):
    found = EMDReranker(store).rerank(
        queries[:1], [[100, 101, -1]], np.array([[0.2, 0.4, -np.inf]]), k=3, alpha=0.0
    )
    assert found.ids.tolist() == [[101, 100, -1]]
    np.testing.assert_allclose(found.scores, [[0.4, 0.2, -np.inf]], rtol=1e-6)


def test_flows_move_the_weights_at_the_found_cost(store, sets, queries, candidates):
    found = EMDReranker(store).rerank(queries, candidates, k=3, return_flows=True)
    for query, place in np.ndindex(5, 3):
        reference = sets[int(found.ids[query, place]) - 100]
        match = EMDMatcher().match(queries[query], reference)
        flow = found.flows[query, place]
        torch.testing.assert_close(flow.sum(dim=1), match.query_weights)
        torch.testing.assert_close(flow.sum(dim=0), match.reference_weights)
        similarity = (flow * (1 - match.cost)).sum()
        torch.testing.assert_close(similarity, found.similarities[query, place])


def test_sets_of_different_sizes_and_string_ids(tmp_path, generator, queries):
    sizes = (3, 9, 5, 6)
    sets = [structured_sets(1, n, CHANNELS, generator)[0] for n in sizes]
    names = ["wren", "robin", "tit", "crow"]
    path = tmp_path / "varying"
    with LocalFeatureStore.create(
        path, channels=CHANNELS, nodes=None, codec="float32", ids="string"
    ) as writer:
        writer.append(names, sets)
    store = LocalFeatureStore.open(path)
    expected = torch.tensor(
        [[float(EMDMatcher().paired(query, one)) for one in sets] for query in queries]
    )
    wanted = [[names[i] for i in row] for row in expected.argsort(dim=1, descending=True).tolist()]
    dense = EMDMatcher(coupling="dense")
    for matcher in (EMDMatcher(), EMDMatcher(ground_cost="centered_cosine"), dense):
        found = EMDReranker(store, matcher).rerank(queries, [names] * 5, k=4)
        assert found.ids.dtype == object
        if matcher.ground_cost == "cosine" and matcher is not dense:
            assert found.ids.tolist() == wanted
        row = found.ids.tolist()[0]
        by_name = dict(zip(names, sets, strict=True))
        similarities = [float(matcher.paired(queries[0], by_name[name])) for name in row]
        np.testing.assert_allclose(found.similarities[0], similarities, atol=2e-6)
    some = EMDReranker(store).rerank(queries[:1], [["tit", None, "", "crow"]], k=3)
    assert set(some.ids[0, :2]) == {"tit", "crow"}
    assert some.ids[0, 2] is None


def test_similarities_of_all_candidates(store, sets, queries, candidates):
    found = EMDReranker(store).similarities(queries, candidates)
    np.testing.assert_allclose(found, everything(sets, queries, candidates), atol=3e-6)


def test_a_query_without_nodes_of_signal_is_ranked(store, candidates):
    found = EMDReranker(store).rerank(torch.zeros(1, 4, CHANNELS), candidates[:1], k=2)
    assert torch.equal(found.ids, candidates[:1, :2])
    assert found.similarities.tolist() == [[0.0, 0.0]]


def test_no_queries_are_no_error(store):
    found = EMDReranker(store).rerank(torch.zeros(0, 4, CHANNELS), np.zeros((0, 5), np.int64), k=2)
    assert found.ids.shape == (0, 2)
    assert found.skipped == 0.0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 41}, ValueError, r"k: expected 1 to 40, the candidates, got 41"),
        ({"k": 0}, ValueError, r"k: expected 1 to 40"),
        ({"alpha": 1.5}, ValueError, r"alpha: expected 0 to 1, got 1\.5"),
        ({"alpha": 0.5}, ValueError, r"candidate_scores: expected the first stage's, as alpha"),
        (
            {"alpha": 0.5, "candidate_scores": torch.ones(5, 3)},
            ValueError,
            r"candidate_scores: expected shape \[5, 40\], got \[5, 3\]",
        ),
        (
            {"alpha": 0.5, "candidate_scores": torch.full((5, 40), torch.nan)},
            ValueError,
            r"got nan for query 0, candidate 0",
        ),
        (
            {"query_features": torch.ones(5, 3, 8)},
            ValueError,
            r"query_features: expected shape \[Q, N, 16\], got \[5, 3, 8\]",
        ),
        ({"query_features": torch.ones(5, 17)}, ValueError, r"multiple of channels = 16"),
        ({"query_features": torch.ones(4, 2, 16)}, ValueError, r"each of the 4 queries, got 5"),
        (
            {"query_features": torch.full((5, 2, 16), torch.inf)},
            ValueError,
            r"query_features: expected finite",
        ),
        ({"query_features": np.ones((5, 2, 16), int)}, TypeError, r"floating point, got int64"),
        ({"candidate_ids": [["wren"]] * 5, "k": 1}, TypeError, r"whole numbers"),
        ({"candidate_ids": torch.ones(5, 40) / 2}, TypeError, r"whole numbers or strings"),
        ({"candidate_ids": torch.ones(5).long()}, ValueError, r"expected shape \[Q, C\]"),
        ({"candidate_ids": [[100], [101, 102]]}, ValueError, r"fill short rows up with -1"),
    ],
)
def test_bad_arguments(store, queries, candidates, change, error, words):
    arguments = {"query_features": queries, "candidate_ids": candidates} | change
    with pytest.raises(error, match=words):
        EMDReranker(store).rerank(**arguments)


def test_missing_and_double_ids_are_named(store, queries, candidates):
    wrong = candidates.clone()
    wrong[1, 3] = 7
    with pytest.raises(ValueError, match=r"1 of 200 are not in the store n\.store \(80 sets\): 7"):
        EMDReranker(store).rerank(queries, wrong)
    wrong = candidates.clone()
    wrong[2, 5] = wrong[2, 9]
    with pytest.raises(ValueError, match=rf"query 2 has {int(wrong[2, 9])} twice"):
        EMDReranker(store).rerank(queries, wrong)
