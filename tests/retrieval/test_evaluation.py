import numpy as np
import pytest
import torch
from support import structured_sets

from emd_retrieval.features import FeatureSet
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import (
    Ranking,
    compare_rankings,
    evaluate_sets,
    evaluate_vectors,
    rank_by,
    score_ranking,
    summarize,
)

METRICS = ["P@1", "RP", "MAP@R"]


def feature_set(labels, generator, channels=8, spread=0.8):
    """Sets around one prototype set a class, with their mean node as global vector."""
    labels = torch.as_tensor(labels)
    prototypes = structured_sets(int(labels.max()) + 1, 5, channels, generator)
    noise = torch.randn(len(labels), 5, channels, generator=generator)
    nodes = prototypes[labels] + spread * noise
    return FeatureSet(nodes, nodes.mean(dim=1), labels, torch.arange(len(labels)))


@pytest.fixture
def features(generator):
    return feature_set([0] * 6 + [1] * 3 + [2] * 9 + [3] * 2 + [4], generator)


@pytest.mark.parametrize("shortlist", [8, 15, 10_000, None])
def test_scores_are_those_of_the_rankings(shortlist, features):
    evaluation = evaluate_sets(features, shortlist=shortlist, method="EMD", curve=False)
    itself = torch.arange(21)
    unit = torch.nn.functional.normalize(features.global_vectors)
    raw = rank_by(unit @ unit.mT, 20, exclude=itself)
    emd = EMDMatcher().all_pairs(features.nodes)
    compared = 20 if shortlist is None else min(shortlist, 20)
    expected = {"Raw": raw, "EMD": raw.reordered(emd.gather(1, raw.rows)[:, :compared])}
    assert list(evaluation.rankings) == ["Raw", "EMD"]
    for name, ranking in expected.items():
        assert torch.equal(evaluation.rankings[name].rows, ranking.top(8).rows)
        assert evaluation.scores[name].mean == score_ranking(ranking, features.labels).mean
    assert evaluation.left_out == 1, "the class of one image"
    assert evaluation.curve is None


def test_metrics_table(features):
    evaluation = evaluate_sets(features, shortlist=8, curve=False)
    table = evaluation.metrics
    assert list(table["method"]) == ["Raw"] * 3 + ["DeepEMD"] * 3
    assert list(table["metric"]) == METRICS * 2
    assert table.loc[:2, ["gain", "gain_low", "gain_high"]].isna().all(axis=None)
    for row in table.itertuples():
        assert row.value == pytest.approx(evaluation.scores[row.method].mean[row.metric])
        assert row.low <= row.value <= row.high
    for row in table[3:].itertuples():
        raw, emd = (evaluation.scores[m].per_query[row.metric] for m in ("Raw", "DeepEMD"))
        assert row.gain == pytest.approx((emd - raw).mean())
        assert row.gain_low <= row.gain <= row.gain_high


def test_structure_beats_means_where_only_structure_tells(generator):
    """Classes that share a mean node: pooled vectors see noise, matched nodes see the class."""
    labels = torch.arange(40) % 4
    parts = torch.randn(4, 3, 16, generator=generator)
    nodes = torch.cat([parts, -parts], dim=1)[labels] + 5
    nodes = nodes + 0.5 * torch.randn(nodes.shape, generator=generator)
    features = FeatureSet(nodes, nodes.mean(dim=1), labels, torch.arange(40))
    table = evaluate_sets(features, shortlist=None, curve=False).metrics.set_index(
        ["method", "metric"]
    )
    assert table.loc[("DeepEMD", "MAP@R"), "value"] > 90
    assert table.loc[("Raw", "MAP@R"), "value"] < 50
    assert table.loc[("DeepEMD", "MAP@R"), "gain_low"] > 0


def test_separate_gallery(generator):
    whole = feature_set([0] * 8 + [1] * 6 + [2] * 7, generator)
    query = whole.subset(torch.arange(0, 21, 3))
    gallery = whole.subset(torch.tensor([row for row in range(21) if row % 3]))
    evaluation = evaluate_sets(query, gallery, shortlist=6)
    similarity = EMDMatcher().all_pairs(query.nodes, gallery.nodes)
    rows = evaluation.rankings["DeepEMD"].rows
    values = similarity.gather(1, rows)
    assert rows.shape == (7, 5)
    assert (values.diff(dim=1) <= 1e-6).all()
    expected = score_ranking(evaluation.rankings["DeepEMD"], query.labels, gallery.labels)
    assert evaluation.scores["DeepEMD"].mean == expected.mean


def test_a_gallery_equal_to_the_queries_is_not_the_queries(features):
    """Given as a gallery, each query finds itself: that is what was asked for."""
    evaluation = evaluate_sets(features, features, shortlist=None, curve=False)
    assert evaluation.scores["DeepEMD"].mean["P@1"] == 100
    assert evaluation.left_out == 0


@pytest.mark.parametrize("shortlist", [15, None])
def test_the_curve_ends_at_the_full_result(shortlist, features):
    evaluation = evaluate_sets(features, shortlist=shortlist)
    curve = evaluation.curve
    assert list(curve.columns) == ["shortlist", *METRICS, "ms a query"]
    assert curve["shortlist"].tolist() == ([10, 15] if shortlist else [10, 20])
    last = curve.iloc[-1]
    for metric in METRICS:
        assert last[metric] == pytest.approx(evaluation.scores["DeepEMD"].mean[metric])
    assert (curve["ms a query"] > 0).all()


def test_all_pairs_of_a_large_gallery_end_the_curve_at_the_full_result(generator):
    """More images than the largest shortlist that is tabulated."""
    many = feature_set(torch.arange(1040) % 260, generator, spread=3.0)
    features = FeatureSet(many.nodes[:, :2], many.global_vectors, many.labels, many.ids)
    evaluation = evaluate_sets(features, shortlist=None)
    assert evaluation.curve["shortlist"].tolist() == [10, 20, 50, 100, 200, 500, 1000, 1039]
    last = evaluation.curve.iloc[-1]
    assert last["MAP@R"] == pytest.approx(evaluation.scores["DeepEMD"].mean["MAP@R"])


def test_the_seed_decides_the_intervals(features):
    first, again, other = (
        evaluate_sets(features, shortlist=8, curve=False, seed=seed).metrics for seed in (1, 1, 2)
    )
    assert first.equals(again)
    assert not first.equals(other)
    assert first["value"].equals(other["value"])


def test_plain_vectors(features):
    evaluation = evaluate_vectors(features)
    assert list(evaluation.rankings) == ["Raw"]
    expected = evaluate_sets(features, shortlist=8, curve=False).scores["Raw"]
    assert evaluation.scores["Raw"].mean == expected.mean
    assert len(evaluation.summary) == 1


def test_summary_is_for_people(features):
    evaluation = evaluate_sets(features, shortlist=8, curve=False)
    summary = evaluation.summary
    assert summary["method"].tolist() == ["Raw", "DeepEMD", "gain of DeepEMD"]
    assert list(summary.columns) == ["method", *METRICS]
    row = evaluation.metrics.iloc[4]
    assert summary.loc[1, "RP"] == f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}]"
    assert summary.loc[2, "RP"] == f"{row.gain:+.1f} [{row.gain_low:+.1f}, {row.gain_high:+.1f}]"
    assert summarize(evaluation.metrics).equals(summary)


def test_compare_rankings_pairs_with_the_first(generator):
    labels = torch.arange(30) % 5
    itself = torch.arange(30)
    same_class = (labels.unsqueeze(0) == labels.unsqueeze(1)).float()
    noise = torch.rand(30, 30, generator=generator)
    rankings = {
        "worst": rank_by(-same_class, 29, exclude=itself),
        "some": rank_by(same_class + 3 * noise, 29, exclude=itself),
        "best": rank_by(same_class, 29, exclude=itself),
    }
    evaluation = compare_rankings(rankings, labels)
    value = evaluation.metrics.set_index(["method", "metric"])
    assert value.loc[("worst", "RP"), "value"] == 0
    assert value.loc[("best", "MAP@R"), "value"] == 100
    assert value.loc[("best", "MAP@R"), "gain"] == 100
    assert np.isnan(value.loc[("worst", "MAP@R"), "gain"])
    assert len(evaluation.summary) == 5


def test_refuses_a_shortlist_below_r_and_explains(features):
    with pytest.raises(ValueError) as caught:
        evaluate_sets(features, shortlist=7)
    assert str(caught.value) == (
        "shortlist: 7 is smaller than the largest R, 8 (relevant images of one query). RP and "
        "MAP@R look at the first R places, so places 8 to 8 would keep the order of the first "
        "stage. Use 8 or more, or 'all'"
    )
    with pytest.raises(ValueError, match="shortlist: expected a positive number, got 0"):
        evaluate_sets(features, shortlist=0)


def test_refuses_what_cannot_be_scored(features, generator):
    with pytest.raises(ValueError, match=r"labels: no query has another .* at least two"):
        evaluate_sets(features.subset(torch.tensor([0, 6, 9, 20])), shortlist=None)
    with pytest.raises(ValueError, match="labels: no query has another image of its class"):
        evaluate_vectors(
            features.subset(features.labels == 0), features.subset(features.labels == 2)
        )
    other = feature_set([0, 0, 1], generator, channels=6)
    with pytest.raises(ValueError) as caught:
        evaluate_sets(features, other, shortlist=None)
    assert str(caught.value) == (
        "gallery: expected nodes of 8 channels, as the queries', got 6; "
        "both must come from the same extractor"
    )
    with pytest.raises(ValueError, match="rankings: expected at least one, got none"):
        compare_rankings({}, features.labels)
    with pytest.raises(ValueError, match="method: 'Raw' is the name of the baseline"):
        evaluate_sets(features, shortlist=None, method="Raw")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_named(bad, features, generator):
    clean = feature_set([0, 0, 1], generator)
    features.nodes[3, 2, 1] = bad
    with pytest.raises(
        ValueError, match=r"query nodes: .* at index \[3, 2, 1\] of shape \[21, 5, 8"
    ):
        evaluate_sets(features, shortlist=None)
    with pytest.raises(ValueError, match=r"gallery nodes: .* at index \[3, 2, 1\]"):
        evaluate_sets(clean, features, shortlist=None)


def test_rankings_of_other_lengths_are_refused(features):
    ranking = Ranking(torch.zeros(5, 9, dtype=torch.long), torch.zeros(5, 9))
    with pytest.raises(ValueError, match=r"query_labels: expected shape \[5\], got \[21\]"):
        compare_rankings({"mine": ranking}, features.labels)
