"""Evaluation: rankings side by side with paired intervals, and the shortlist trade-off."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from emd_retrieval._checks import check_finite, check_positive
from emd_retrieval.features.extraction import FeatureSet
from emd_retrieval.matching import EMDMatcher, PreparedSets
from emd_retrieval.retrieval.bootstrap import bootstrap_interval
from emd_retrieval.retrieval.metrics import (
    METRICS,
    RetrievalScores,
    relevant_counts,
    score_ranking,
)
from emd_retrieval.retrieval.ranking import Ranking, rank_by
from emd_retrieval.retrieval.shortlist import FaissShortlist

_CURVE_SIZES = (10, 20, 50, 100, 200, 500, 1000)
_TIMED_QUERIES = 32


@dataclass(frozen=True)
class Evaluation:
    """Rankings of the same queries by several methods, and their scores.

    Attributes:
        rankings: The first is the baseline of the paired comparison.
        scores: Keyed like ``rankings``.
        metrics: Tidy table, one row a method and metric, in percent points: ``method``, ``metric``,
            ``value``, ``low``, ``high`` and, against the baseline, ``gain``, ``gain_low``,
            ``gain_high``.
        curve: Shortlist size against metrics and latency; ``None`` where there is no shortlist.
    """

    rankings: Mapping[str, Ranking]
    scores: Mapping[str, RetrievalScores]
    metrics: pd.DataFrame
    curve: pd.DataFrame | None = None

    @property
    def summary(self) -> pd.DataFrame:
        """The table for people: a row a method and a row a gain, with 95 % intervals."""
        return summarize(self.metrics)

    @property
    def left_out(self) -> int:
        """How many queries have no relevant gallery image and are left out."""
        return next(iter(self.scores.values())).left_out


def compare_rankings(
    rankings: Mapping[str, Ranking],
    query_labels: Tensor,
    gallery_labels: Tensor | None = None,
    *,
    gallery_includes_query: bool | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score rankings of the same queries, with bootstrap intervals over the queries.

    Args:
        rankings: The first is the baseline; gains over it are paired query by query.
        query_labels: Shape: ``[Q]``.
        gallery_labels: Shape: ``[R]``; ``None`` where query and gallery are the same.
        gallery_includes_query: See :func:`score_ranking`.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there is no ranking, or :func:`score_ranking` refuses one.
    """
    if not rankings:
        raise ValueError("rankings: expected at least one, got none")
    scores = {
        name: score_ranking(
            ranking, query_labels, gallery_labels, gallery_includes_query=gallery_includes_query
        )
        for name, ranking in rankings.items()
    }
    baseline = next(iter(scores))
    rows = []
    for name, score in scores.items():
        for metric in METRICS.values():
            values = score.per_query[metric].to_numpy()
            interval = bootstrap_interval(values, seed=seed)
            row = {
                "method": name,
                "metric": metric,
                "value": score.mean[metric],
                "low": interval.low,
                "high": interval.high,
            }
            if name != baseline:
                paired = values - scores[baseline].per_query[metric].to_numpy()
                gain = bootstrap_interval(paired, seed=seed)
                row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
            rows.append(row)
    columns = ["method", "metric", "value", "low", "high", "gain", "gain_low", "gain_high"]
    metrics = pd.DataFrame(rows).reindex(columns=columns)
    return Evaluation(rankings, scores, metrics)


def evaluate_sets(
    query: FeatureSet,
    gallery: FeatureSet | None = None,
    *,
    matcher: EMDMatcher | None = None,
    shortlist: int | None = 100,
    method: str = "DeepEMD",
    seed: int = 0,
    curve: bool = True,
) -> Evaluation:
    """Retrieve by global vectors (Raw), re-rank by EMD, and score both.

    Args:
        query: Images to search with.
        gallery: Images to search in; ``None`` searches the queries among themselves, each query
            left out of its own answer (the protocol of Table 8).
        matcher: The EMD similarity; the paper's by default.
        shortlist: How many candidates the first stage hands over; ``None`` compares all pairs.
        method: What to call the re-ranked method.
        seed: Seed of the bootstrap.
        curve: Also tabulate shortlist sizes against metrics and measured latency.

    Raises:
        ValueError: If features are not finite, sets do not fit each other, no query has a relevant
            image, or the shortlist is smaller than the largest R.
    """
    if method == "Raw":
        raise ValueError("method: 'Raw' is the name of the baseline; choose another")
    matcher = EMDMatcher() if matcher is None else matcher
    same = gallery is None
    target = query if gallery is None else gallery
    exclude = torch.arange(len(query)) if same else None
    deepest = _deepest_r(query, gallery)
    if shortlist is not None:
        check_shortlist(shortlist, deepest)
        shortlist = min(shortlist, len(target) - int(same))
    index, first = _first_stage(query, gallery, max(deepest, shortlist or _CURVE_SIZES[-1]))
    prepared = matcher.prepare(target.nodes)
    if shortlist is None:
        matrix = matcher.all_pairs(
            prepared if same else query.nodes, prepared, description="EMD, all pairs"
        )
        ranking = rank_by(matrix, deepest, exclude=exclude)
        similarity = matrix.gather(1, first.rows)
    else:
        similarity = matcher.shortlist(
            prepared if same else query.nodes,
            prepared,
            first.rows[:, :shortlist],
            description="EMD, shortlist",
        )
        ranking = first.reordered(similarity).top(deepest)
    gallery_labels = None if same else target.labels
    evaluation = compare_rankings(
        {"Raw": first.top(deepest), method: ranking}, query.labels, gallery_labels, seed=seed
    )
    if not curve:
        return evaluation
    rows = []
    full = len(target) - int(same) if shortlist is None else shortlist
    for size in [*(s for s in _CURVE_SIZES if s < full), full]:
        mean = evaluation.scores[method].mean
        if size < full:
            part = first.reordered(similarity[:, :size]).top(deepest)
            mean = score_ranking(part, query.labels, gallery_labels).mean
        latency = _latency_ms(query, prepared, index, matcher, size, same)
        rows.append({"shortlist": size, **mean, "ms a query": latency})
    return Evaluation(
        evaluation.rankings, evaluation.scores, evaluation.metrics, pd.DataFrame(rows)
    )


def evaluate_vectors(
    query: FeatureSet, gallery: FeatureSet | None = None, *, seed: int = 0
) -> Evaluation:
    """Retrieve by global vectors alone and score that.

    Args:
        query: Images to search with.
        gallery: Images to search in; ``None`` searches the queries among themselves.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: As :func:`evaluate_sets`.
    """
    _, first = _first_stage(query, gallery, _deepest_r(query, gallery))
    return compare_rankings(
        {"Raw": first}, query.labels, None if gallery is None else gallery.labels, seed=seed
    )


def _deepest_r(query: FeatureSet, gallery: FeatureSet | None) -> int:
    """The largest R of any query, after a look at the features."""
    target = query if gallery is None else gallery
    _check_features(query, target)
    relevant = relevant_counts(query.labels, target.labels, gallery_includes_query=gallery is None)
    deepest = int(relevant.max()) if len(relevant) else 0
    if deepest < 1:
        raise ValueError(
            "labels: no query has another image of its class in the gallery, so there is no R to "
            "measure against. Each class needs at least two images (or one in a separate gallery)"
        )
    return deepest


def _first_stage(
    query: FeatureSet, gallery: FeatureSet | None, depth: int
) -> tuple[FaissShortlist, Ranking]:
    """The index over global vectors, and its answer down to ``depth`` places."""
    target = query if gallery is None else gallery
    exclude = torch.arange(len(query)) if gallery is None else None
    index = FaissShortlist(target.global_vectors)
    depth = min(depth, len(target) - int(gallery is None))
    return index, index.search(query.global_vectors, depth, exclude=exclude)


def check_shortlist(shortlist: int, deepest: int) -> None:
    """Raise ``ValueError``, with the reason, if a shortlist cannot hold the largest R."""
    check_positive("shortlist", shortlist)
    if shortlist < deepest:
        raise ValueError(
            f"shortlist: {shortlist} is smaller than the largest R, {deepest} (relevant images of "
            f"one query). RP and MAP@R look at the first R places, so places {shortlist + 1} to "
            f"{deepest} would keep the order of the first stage. Use {deepest} or more, or 'all'"
        )


def summarize(metrics: pd.DataFrame) -> pd.DataFrame:
    """Lay a tidy metrics table out for people: ``72.6 [70.3, 74.8]``, and a row of gains.

    Args:
        metrics: As in :attr:`Evaluation.metrics`.
    """
    rows: list[dict[str, str]] = []
    for name, part in metrics.groupby("method", sort=False):
        rows.append(
            {"method": str(name)}
            | {
                str(r.metric): f"{r.value:.1f} [{r.low:.1f}, {r.high:.1f}]"
                for r in part.itertuples()
            }
        )
        if part["gain"].notna().all():
            rows.append(
                {"method": f"gain of {name}"}
                | {
                    str(r.metric): f"{r.gain:+.1f} [{r.gain_low:+.1f}, {r.gain_high:+.1f}]"
                    for r in part.itertuples()
                }
            )
    return pd.DataFrame(rows)


def _check_features(query: FeatureSet, gallery: FeatureSet) -> None:
    if query.nodes.shape[2] != gallery.nodes.shape[2]:
        raise ValueError(
            f"gallery: expected nodes of {query.nodes.shape[2]} channels, as the queries', "
            f"got {gallery.nodes.shape[2]}; both must come from the same extractor"
        )
    sides = [("query", query)] + ([("gallery", gallery)] if gallery is not query else [])
    for name, side in sides:
        check_finite(f"{name} nodes", side.nodes)


def _latency_ms(
    query: FeatureSet,
    gallery: PreparedSets,
    index: FaissShortlist,
    matcher: EMDMatcher,
    size: int,
    same: bool,
) -> float:
    """Median time of one query at a time through both stages, in milliseconds."""
    count = min(_TIMED_QUERIES, len(query))
    rows = torch.linspace(0, len(query) - 1, count).round().long()
    times = []
    for row in rows:
        at = row.unsqueeze(0)
        start = time.perf_counter()
        first = index.search(query.global_vectors[at], size, exclude=at if same else None)
        matcher.shortlist(query.nodes[at], gallery, first.rows)
        times.append(time.perf_counter() - start)
    return 1e3 * float(torch.tensor(times).median())
