"""Tuning: the table against rankings made by hand, the choice, and what it refuses."""

import numpy as np
import pytest
import torch
from support import structured_sets

from emd_retrieval.retrieval import EMDKNN, Candidates, EMDReranker, LocalFeatureStore
from emd_retrieval.retrieval.tuning import relevance, tune_reranking


@pytest.fixture
def case(tmp_path, generator):
    sets = structured_sets(30, 5, 12, generator)
    with LocalFeatureStore.create(tmp_path / "s", channels=12, nodes=5, codec="float32") as writer:
        writer.append(np.arange(30), sets)
    ids = torch.stack([torch.randperm(30, generator=generator) for _ in range(6)]).numpy()
    scores = -np.sort(-np.random.default_rng(0).random((6, 30)), axis=1).astype(np.float32)
    label_of = {i: i % 5 for i in range(30)}
    candidates = Candidates(ids, scores)
    hits = relevance(candidates, [0, 1, 2, 3, 4, 0], label_of)
    reranker = EMDReranker(LocalFeatureStore.open(tmp_path / "s"))
    return reranker, structured_sets(6, 5, 12, generator), candidates, hits, torch.full((6,), 6)


def test_every_setting_is_what_a_ranking_by_hand_gives(case):
    reranker, queries, candidates, hits, _ = case
    tuned = tune_reranking(*case, alphas=(0.0, 0.4, 1.0), sizes=(8, 30, 500))
    assert sorted(set(tuned.table["shortlist"])) == [8, 30]
    for row in tuned.table.itertuples():
        size, alpha = row.shortlist, row.alpha
        found = reranker.rerank(
            queries, candidates.ids[:, :size], candidates.scores[:, :size], size, alpha=alpha
        )
        first = hits[torch.arange(6), [list(candidates.ids[q]).index(int(found.ids[q, 0]))
                                       for q in range(6)]]  # fmt: skip
        assert row[3] == pytest.approx(100 * float(first.float().mean()))
    head = hits[:, :6].float()
    precision = head.cumsum(1) / torch.arange(1, 7)
    assert tuned.baseline["MAP@R"] == pytest.approx(
        float(100 * (precision * head).sum(1).mean() / 6)
    )
    assert tuned.baseline["RP"] == pytest.approx(float(100 * head.mean()))


def test_of_equally_good_settings_the_cheapest_is_chosen(case):
    reranker, queries, candidates, hits, relevant = case
    everything_right = torch.ones_like(hits)
    tuned = tune_reranking(reranker, queries, candidates, everything_right, relevant)
    assert (tuned.alpha, tuned.shortlist) == (1.0, 10)


def test_without_scores_only_the_emd_is_tried(case):
    reranker, queries, candidates, hits, relevant = case
    tuned = tune_reranking(reranker, queries, Candidates(candidates.ids), hits, relevant)
    assert set(tuned.table["alpha"]) == {1.0}


def test_refusals(case):
    reranker, queries, candidates, hits, _ = case
    with pytest.raises(ValueError, match="no query has an image of its class"):
        tune_reranking(reranker, queries, candidates, hits, torch.zeros(6).long())
    with pytest.raises(ValueError, match=r"at least 31 a query, the largest R"):
        tune_reranking(reranker, queries, candidates, hits, torch.full((6,), 31))
    with pytest.raises(ValueError, match=r"alphas: expected 0 to 1, got 2"):
        tune_reranking(*case, alphas=(2.0,))
    for empty in ("alphas", "sizes"):
        with pytest.raises(ValueError, match=f"{empty}: expected at least one, got none"):
            tune_reranking(*case, **{empty: ()})
    with pytest.raises(ValueError, match=r"metric: expected one of P@1, RP, MAP@R"):
        tune_reranking(*case, metric="mAP")
    with pytest.raises(ValueError, match=r"labels: 2 of the candidates have none"):
        relevance(Candidates(np.array([[1, 2, -1]])), ["a"], {})


def test_places_filled_up_with_empty_names_need_no_label():
    """A file of names has no other way to fill short rows up: arrays of text hold no ``None``."""
    ids = np.array([["wren", "robin"], ["robin", ""]]).astype(object)
    hits = relevance(Candidates(ids), [1, 2], {"wren": 1, "robin": 2})
    assert hits.tolist() == [[True, False], [True, False]]


def test_the_knn_searches_a_store(case):
    reranker, queries, *_ = case
    knn = EMDKNN.from_store(reranker.store, None)
    distance, rows = knn(queries.flatten(1), 4)
    found = reranker.rerank(queries, np.arange(30)[None].repeat(6, 0), k=4)
    assert torch.equal(rows, found.ids)
    torch.testing.assert_close(distance, 1 - found.similarities, rtol=0, atol=3e-6)
    assert torch.equal(knn(queries.flatten(1), 4)[1], rows)
