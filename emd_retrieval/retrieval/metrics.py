"""P@1, R-Precision and MAP@R ("A Metric Learning Reality Check", Musgrave et al. 2020).

Pure functions give one value a query, from the definitions; PML's ``AccuracyCalculator`` gives the
means that are reported. :func:`score_ranking` computes both and holds them against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from emd_retrieval._checks import check_tensor
from emd_retrieval.retrieval.ranking import Ranking

METRICS = {
    "precision_at_1": "P@1",
    "r_precision": "RP",
    "mean_average_precision_at_r": "MAP@R",
}


@dataclass(frozen=True)
class RetrievalScores:
    """The three metrics of one ranking.

    Attributes:
        mean: Percent, keyed by ``"P@1"``, ``"RP"``, ``"MAP@R"``; from PML's ``AccuracyCalculator``.
        per_query: Percent, one column a metric and one row a query that has relevant gallery
            images.
        queries: Rows of those queries. Shape: ``[q]``.
        left_out: How many queries have none and are left out.
    """

    mean: dict[str, float]
    per_query: pd.DataFrame
    queries: Tensor
    left_out: int


def precision_at_1(hits: Tensor) -> Tensor:
    """1 where the first neighbour is of the query's class.

    Shape:
        ``[Q, K]`` boolean to ``[Q]`` float64.
    """
    return hits[:, 0].double()


def r_precision(hits: Tensor, relevant: Tensor) -> Tensor:
    """Hits among the first R neighbours, over R.

    Args:
        hits: Whether each neighbour is of the query's class. Shape: ``[Q, K]``, K >= max R.
        relevant: R, how many gallery images are. Shape: ``[Q]``.

    Example:
        >>> r_precision(torch.tensor([[True, False, True]]), torch.tensor([2]))
        tensor([0.5000], dtype=torch.float64)
    """
    return _first(hits, relevant).sum(dim=1).double() / relevant


def map_at_r(hits: Tensor, relevant: Tensor) -> Tensor:
    """Mean over i <= R of the precision at i where i is a hit, else 0.

    Args:
        hits: Whether each neighbour is of the query's class. Shape: ``[Q, K]``, K >= max R.
        relevant: R, how many gallery images are. Shape: ``[Q]``.

    Example:
        >>> map_at_r(torch.tensor([[True, False, True]]), torch.tensor([2]))
        tensor([0.5000], dtype=torch.float64)
        >>> map_at_r(torch.tensor([[False, True, True]]), torch.tensor([2]))
        tensor([0.2500], dtype=torch.float64)
    """
    first = _first(hits, relevant)
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = first.cumsum(dim=1).double() / places
    return (precision * first).sum(dim=1) / relevant


def _first(hits: Tensor, relevant: Tensor) -> Tensor:
    """Hits within the first R places. Shape: ``[Q, K]``."""
    places = torch.arange(hits.shape[1], device=hits.device)
    return hits & (places < relevant.unsqueeze(1))


def relevant_counts(
    query_labels: Tensor, gallery_labels: Tensor, *, gallery_includes_query: bool
) -> Tensor:
    """R of each query: gallery images of its class, itself not counted. Shape: ``[Q]``."""
    classes, inverse = torch.unique(torch.cat([query_labels, gallery_labels]), return_inverse=True)
    counts = torch.bincount(inverse[len(query_labels) :], minlength=len(classes))
    return counts[inverse[: len(query_labels)]] - int(gallery_includes_query)


def score_ranking(
    ranking: Ranking,
    query_labels: Tensor,
    gallery_labels: Tensor | None = None,
    *,
    gallery_includes_query: bool | None = None,
) -> RetrievalScores:
    """P@1, RP and MAP@R of a ranking, in percent.

    Args:
        ranking: Gallery rows for each query, best first, at least max R of them; a query's own row
            must not be among them where query and gallery are the same.
        query_labels: Shape: ``[Q]``.
        gallery_labels: Shape: ``[R]``; ``None`` where query and gallery are the same.
        gallery_includes_query: The first Q gallery rows are the queries, and no query's R counts
            itself; by default so exactly where ``gallery_labels`` is ``None``.

    Raises:
        ValueError: If no query has a relevant gallery image, the ranking is too shallow or names
            rows that the gallery does not have, or labels do not fit.
    """
    same = gallery_labels is None if gallery_includes_query is None else gallery_includes_query
    gallery_labels = query_labels if gallery_labels is None else gallery_labels
    check_tensor("query_labels", query_labels, [len(ranking)], floating=False)
    check_tensor("gallery_labels", gallery_labels, ["R"], floating=False)
    if same and not torch.equal(gallery_labels[: len(query_labels)], query_labels):
        raise ValueError(
            "gallery_labels: expected the queries' labels first, since the first gallery rows are "
            "the queries, got others"
        )
    relevant = relevant_counts(query_labels, gallery_labels, gallery_includes_query=same)
    kept = relevant > 0
    if not bool(kept.any()):
        raise ValueError(
            "labels: no query has another image of its class in the gallery, so there is no R to "
            "measure against. Each class needs at least two images (or one in a separate gallery)"
        )
    deepest = int(relevant.max())
    if ranking.depth < deepest:
        raise ValueError(
            f"ranking: expected at least max R = {deepest} neighbours a query, got {ranking.depth}"
        )
    ranking = ranking.top(deepest)
    lowest, highest = int(ranking.rows.min()), int(ranking.rows.max())
    if lowest < 0 or highest >= len(gallery_labels):
        raise ValueError(
            f"ranking: expected rows of the gallery, 0 to {len(gallery_labels) - 1}, "
            f"got {lowest} to {highest}"
        )
    hits = gallery_labels[ranking.rows[kept]] == query_labels[kept].unsqueeze(1)
    per_query = pd.DataFrame(
        {
            "P@1": 100 * precision_at_1(hits).numpy(),
            "RP": 100 * r_precision(hits, relevant[kept]).numpy(),
            "MAP@R": 100 * map_at_r(hits, relevant[kept]).numpy(),
        }
    )
    mean = _pml_means(ranking, query_labels, gallery_labels, same)
    worst = max(abs(mean[name] - float(per_query[name].mean())) for name in mean)
    if worst > 1e-4:
        raise RuntimeError(
            f"metrics: PML's AccuracyCalculator and the definitions differ by {worst:.2g} points; "
            f"this is a defect, please report it"
        )
    return RetrievalScores(mean, per_query, kept.nonzero().squeeze(1), int((~kept).sum()))


class _GivenRanking:
    """A ``knn_func`` that answers with a ranking made before."""

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking

    def __call__(
        self, query: Tensor, k: int, reference: Tensor, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        top = self.ranking.top(k)
        return top.scores.neg(), top.rows


def _pml_means(
    ranking: Ranking, query_labels: Tensor, gallery_labels: Tensor, same: bool
) -> dict[str, float]:
    calculator = AccuracyCalculator(
        include=tuple(METRICS),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=_GivenRanking(ranking),
    )
    # PML keeps labels as float32, so they are renumbered to stay exact.
    _, numbered = torch.unique(torch.cat([query_labels, gallery_labels]), return_inverse=True)
    queries, gallery = numbered[: len(query_labels)], numbered[len(query_labels) :]
    means = calculator.get_accuracy(
        torch.zeros(len(queries), 1),
        queries,
        torch.zeros(len(gallery), 1),
        gallery,
        ref_includes_query=same,
    )
    return {short: 100 * float(means[name]) for name, short in METRICS.items()}
