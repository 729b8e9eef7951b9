"""Choosing alpha and the size of the shortlist on labelled queries: accuracy against latency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_choice, check_positive, check_tensor
from emd_retrieval.retrieval.candidates import Candidates
from emd_retrieval.retrieval.metrics import map_at_r, precision_at_1, r_precision
from emd_retrieval.retrieval.reranker import EMDReranker
from emd_retrieval.retrieval.shortlists import Shortlist

ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES = (10, 20, 50, 100, 200)

_TIMED_QUERIES = 32
AS_GOOD = 0.1
"""Percent points within which two settings count as equally good."""


@dataclass(frozen=True)
class TunedReranking:
    """What every setting gives, and the one that was chosen.

    Attributes:
        table: A row a setting: ``alpha``, ``shortlist``, ``P@1``, ``RP``, ``MAP@R`` (percent),
            ``ms a query``.
        baseline: The metrics of the first stage alone.
        alpha: Chosen.
        shortlist: Chosen.
        metric: What was chosen by.
    """

    table: pd.DataFrame
    baseline: dict[str, float]
    alpha: float
    shortlist: int
    metric: str


def relevance(
    candidates: Candidates, query_labels: Sequence[Any], label_of: dict[Any, Any]
) -> Tensor:
    """Whether each candidate is of its query's class. Shape: ``[Q, C]``, bool.

    Raises:
        ValueError: If a candidate has no label.
    """
    ids = candidates.ids.tolist()
    unknown = {
        name for row in ids for name in row if name not in label_of and name not in (-1, None, "")
    }
    if unknown:
        raise ValueError(
            f"labels: {len(unknown)} of the candidates have none, for instance "
            f"{next(iter(unknown))!r}"
        )
    hits = [
        [name in label_of and label_of[name] == label for name in row]
        for row, label in zip(ids, query_labels, strict=True)
    ]
    return torch.tensor(hits, dtype=torch.bool)


def tune_reranking(
    reranker: EMDReranker,
    query_features: Tensor | NDArray[Any],
    candidates: Candidates,
    hits: Tensor,
    relevant: Tensor,
    *,
    alphas: Sequence[float] = ALPHAS,
    sizes: Sequence[int] = SIZES,
    metric: str = "MAP@R",
    budget_ms: float | None = None,
    stage: Shortlist | None = None,
    query_vectors: Tensor | None = None,
) -> TunedReranking:
    """Score every alpha and shortlist size, and choose.

    The EMD of each pair is computed once. The best setting within the budget is chosen; of those
    that are as good to a tenth of a point the one with the smallest shortlist, then the largest
    alpha.

    Args:
        reranker: With the store and the matcher.
        query_features: Shape: ``[Q, N, D]``.
        candidates: Of the first stage, as deep as the largest R and the largest size.
        hits: Whether each candidate is of its query's class. Shape: ``[Q, C]``.
        relevant: R, how many images of the gallery are. Shape: ``[Q]``.
        alphas: To be tried, 0 to 1; only 1 where the first stage has no scores.
        sizes: To be tried; those beyond the candidates are left out.
        metric: What is to be best: ``"P@1"``, ``"RP"`` or ``"MAP@R"``.
        budget_ms: Largest median latency of a query, in milliseconds.
        stage: The first stage, so that its time counts as well.
        query_vectors: What ``stage`` searches for. Shape: ``[Q, G]``.

    Raises:
        ValueError: If shapes do not fit, no query has anything to find, the candidates are fewer
            than the largest R, or no setting is within the budget.
    """
    check_choice("metric", metric, ["P@1", "RP", "MAP@R"])
    count, depth = candidates.ids.shape
    check_tensor("hits", hits, [count, depth], floating=False)
    check_tensor("relevant", relevant, [count], floating=False)
    kept = relevant > 0
    if not bool(kept.any()):
        raise ValueError("labels: no query has an image of its class in the gallery")
    deepest = int(relevant.max())
    if depth < deepest:
        raise ValueError(
            f"candidates: expected at least {deepest} a query, the largest R (relevant images of "
            f"one query), got {depth}; RP and MAP@R look at the first R places"
        )
    for name, values in (("alphas", alphas), ("sizes", sizes)):
        if not len(values):
            raise ValueError(f"{name}: expected at least one, got none")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alphas: expected 0 to 1, got {alpha}")
    for size in sizes:
        check_positive("sizes", size)
    tried = sorted({min(size, depth) for size in sizes})
    scores = candidates.scores
    wanted = list(alphas) if scores is not None else [1.0]

    head = candidates.top(tried[-1])
    similarity = reranker.similarities(query_features, head.ids, description="EMD, candidates")
    absent = np.isneginf(similarity)
    rows = []
    for size in tried:
        latency = _latency_ms(reranker, query_features, head.top(size), stage, query_vectors)
        for alpha in wanted:
            mixed = alpha * np.where(absent, 0, similarity)[:, :size]
            if scores is not None and alpha < 1:
                mixed = mixed + (1 - alpha) * np.where(absent, 0, scores[:, : tried[-1]])[:, :size]
            mixed[absent[:, :size]] = -np.inf
            order = torch.from_numpy(np.argsort(-mixed, axis=1, kind="stable"))
            ranked = torch.cat([hits[:, :size].gather(1, order), hits[:, size:]], dim=1)
            rows.append(
                {"alpha": alpha, "shortlist": size}
                | _metrics(ranked[kept], relevant[kept])
                | {"ms a query": latency}
            )
    table = pd.DataFrame(rows)
    affordable = table if budget_ms is None else table[table["ms a query"] <= budget_ms]
    if not len(affordable):
        raise ValueError(
            f"budget_ms: no setting is within {budget_ms:g} ms a query; the fastest takes "
            f"{table['ms a query'].min():.2f}"
        )
    good = affordable[affordable[metric] >= affordable[metric].max() - AS_GOOD]
    best = good.sort_values(["shortlist", "alpha"], ascending=[True, False], kind="stable").iloc[0]
    return TunedReranking(
        table,
        _metrics(hits[kept], relevant[kept]),
        float(best["alpha"]),
        int(best["shortlist"]),
        metric,
    )


def _metrics(hits: Tensor, relevant: Tensor) -> dict[str, float]:
    """Means over the queries, in percent."""
    return {
        "P@1": 100 * float(precision_at_1(hits).mean()),
        "RP": 100 * float(r_precision(hits, relevant).mean()),
        "MAP@R": 100 * float(map_at_r(hits, relevant).mean()),
    }


def _latency_ms(
    reranker: EMDReranker,
    query_features: Tensor | NDArray[Any],
    head: Candidates,
    stage: Shortlist | None,
    query_vectors: Tensor | None,
) -> float:
    """Median time of one query at a time, in milliseconds."""
    size = head.ids.shape[1]
    rows = np.linspace(0, len(head) - 1, min(_TIMED_QUERIES, len(head))).round().astype(int)
    times = []
    for row in rows.tolist():
        start = time.perf_counter()
        # A ready table has no search to time.
        if stage is not None and query_vectors is not None and hasattr(stage, "channels"):
            stage.search(query_vectors[row : row + 1], size)
        reranker.rerank(query_features[row : row + 1], head.ids[row : row + 1], k=min(10, size))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))
