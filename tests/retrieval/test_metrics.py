import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from emd_retrieval.retrieval import Ranking, map_at_r, r_precision, rank_by, score_ranking

PML_NAMES = {
    "P@1": "precision_at_1",
    "RP": "r_precision",
    "MAP@R": "mean_average_precision_at_r",
}


def plain_scores(ranking, query_labels, gallery_labels, itself):
    """The three metrics from their definitions, in plain loops; ``None`` where R is zero."""
    results = []
    for answer, label in zip(ranking.rows.tolist(), query_labels.tolist(), strict=True):
        relevant = sum(other == label for other in gallery_labels.tolist()) - itself
        if relevant == 0:
            results.append(None)
            continue
        hits = [int(gallery_labels[row]) == label for row in answer[:relevant]]
        average = sum(sum(hits[: i + 1]) / (i + 1) for i in range(len(hits)) if hits[i]) / relevant
        results.append((hits[0], sum(hits) / relevant, average))
    return results


def labels_of(sizes, generator):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=generator)]


def cosine(query, gallery):
    return F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).mT


def assert_agrees(scores, ranking, query_labels, gallery_labels, itself):
    expected = plain_scores(ranking, query_labels, gallery_labels, itself)
    kept = [row for row, values in enumerate(expected) if values is not None]
    assert scores.queries.tolist() == kept
    assert scores.left_out == len(expected) - len(kept)
    for place, name in enumerate(PML_NAMES):
        column = [100 * expected[row][place] for row in kept]
        assert scores.per_query[name].tolist() == pytest.approx(column, abs=1e-9)
        assert scores.mean[name] == pytest.approx(sum(column) / len(column), abs=1e-4)


@pytest.mark.parametrize("sizes", [[4] * 6, [1, 2, 3, 9, 1, 5], [2] * 10, [30, 2], [7, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_query_is_gallery(sizes, seed):
    """Against the definitions, and against PML searching the vectors itself."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels_of(sizes, generator)
    vectors = torch.randn(len(labels), 6, generator=generator)
    vectors += F.one_hot(labels, 6 + len(sizes))[:, :6]
    everything = len(labels) - 1
    ranking = rank_by(cosine(vectors, vectors), everything, exclude=torch.arange(len(labels)))
    scores = score_ranking(ranking, labels)
    assert_agrees(scores, ranking, labels, labels, itself=1)
    calculator = AccuracyCalculator(
        include=tuple(PML_NAMES.values()), k="max_bin_count", device=torch.device("cpu")
    )
    pml = calculator.get_accuracy(F.normalize(vectors), labels)
    for name, theirs in PML_NAMES.items():
        assert scores.mean[name] == pytest.approx(100 * pml[theirs], abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_separate_gallery(seed):
    """Classes of one side only on both sides, so that some queries have nothing to find."""
    generator = torch.Generator().manual_seed(seed)
    gallery_labels = labels_of([5, 1, 0, 8, 20], generator)
    query_labels = labels_of([3, 2, 4, 1, 0, 2], generator)
    query = torch.randn(len(query_labels), 6, generator=generator)
    gallery = torch.randn(len(gallery_labels), 6, generator=generator)
    ranking = rank_by(cosine(query, gallery), len(gallery_labels))
    scores = score_ranking(ranking, query_labels, gallery_labels)
    assert_agrees(scores, ranking, query_labels, gallery_labels, itself=0)
    calculator = AccuracyCalculator(
        include=tuple(PML_NAMES.values()), k="max_bin_count", device=torch.device("cpu")
    )
    pml = calculator.get_accuracy(
        F.normalize(query), query_labels, F.normalize(gallery), gallery_labels
    )
    for name, theirs in PML_NAMES.items():
        assert scores.mean[name] == pytest.approx(100 * pml[theirs], abs=1e-4)


def test_gallery_that_starts_with_the_queries(generator):
    gallery_labels = labels_of([5, 3, 8, 1], generator)
    vectors = torch.randn(len(gallery_labels), 6, generator=generator)
    count = 9
    ranking = rank_by(
        cosine(vectors[:count], vectors), len(vectors) - 1, exclude=torch.arange(count)
    )
    scores = score_ranking(
        ranking, gallery_labels[:count], gallery_labels, gallery_includes_query=True
    )
    assert_agrees(scores, ranking, gallery_labels[:count], gallery_labels, itself=1)


def test_labels_may_be_large_and_sparse():
    """PML keeps labels as float32, where 2**24 + 1 is 2**24."""
    labels = torch.tensor([2**24, 2**24 + 1, 2**24, 2**24 + 1])
    ranking = Ranking(torch.tensor([[2, 1], [0, 3], [0, 1], [0, 2]]), torch.zeros(4, 2))
    scores = score_ranking(ranking, labels)
    assert scores.per_query["P@1"].tolist() == [100, 0, 100, 0]


def test_depth_beyond_r_changes_nothing(generator):
    labels = labels_of([4, 6, 2], generator)
    scores = torch.randn(12, 12, generator=generator)
    deep = rank_by(scores, 11, exclude=torch.arange(12))
    assert score_ranking(deep, labels).mean == score_ranking(deep.top(5), labels).mean


def test_pure_functions_on_a_worked_example():
    """Musgrave et al.: hits at 1 and 3 of R = 3 give (1/1 + 2/3) / 3."""
    hits = torch.tensor([[True, False, True, True]])
    relevant = torch.tensor([3])
    assert r_precision(hits, relevant).item() == pytest.approx(2 / 3)
    assert map_at_r(hits, relevant).item() == pytest.approx((1 + 2 / 3) / 3)


def test_refuses_bad_input():
    labels = torch.tensor([0, 0, 0, 1, 1])
    rows = torch.tensor([[1], [0], [0], [4], [3]])
    with pytest.raises(ValueError) as caught:
        score_ranking(Ranking(rows, torch.zeros(5, 1)), labels)
    assert str(caught.value) == "ranking: expected at least max R = 2 neighbours a query, got 1"
    with pytest.raises(ValueError, match="labels: no query has another image of its class"):
        score_ranking(Ranking(rows, torch.zeros(5, 1)), torch.arange(5))
    with pytest.raises(ValueError, match=r"query_labels: expected shape \[5\], got \[4\]"):
        score_ranking(Ranking(rows, torch.zeros(5, 1)), labels[:4])
    for bad in (5, -1):
        ranking = Ranking(torch.full((5, 2), bad), torch.zeros(5, 2))
        with pytest.raises(ValueError, match="ranking: expected rows of the gallery, 0 to 4, got"):
            score_ranking(ranking, labels)
    with pytest.raises(ValueError, match="gallery_labels: expected the queries' labels first"):
        score_ranking(
            Ranking(rows.expand(5, 2), torch.zeros(5, 2)),
            labels,
            labels.flip(0),
            gallery_includes_query=True,
        )
