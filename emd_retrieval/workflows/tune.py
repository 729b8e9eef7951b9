"""``tune``: alpha and shortlist size chosen on labelled queries, with a plot of the trade-off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from emd_retrieval._checks import check_positive
from emd_retrieval._files import check_folder
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import save_figure
from emd_retrieval.reports.tradeoff import tradeoff_figure
from emd_retrieval.retrieval import EMDReranker, LocalFeatureStore
from emd_retrieval.retrieval.tuning import (
    ALPHAS,
    AS_GOOD,
    SIZES,
    TunedReranking,
    relevance,
    tune_reranking,
)
from emd_retrieval.workflows.inputs import read_label_table
from emd_retrieval.workflows.queries import (
    Queries,
    SearchSettings,
    first_stage,
    matcher_of,
    own_ids,
    read_queries,
)
from emd_retrieval.workflows.rerank import candidates_of, notes_of


@dataclass(frozen=True, kw_only=True)
class TuneReranking(SearchSettings):
    """Settings of :func:`tune_queries`, besides those of :class:`SearchSettings`.

    ``shortlist`` is not read; the sizes take its place.

    Attributes:
        labels: Table with columns ``id``, ``label`` of the gallery; parquet or CSV.
        query_labels: The same for the queries; by default ``labels`` has them as well.
        alphas: To be tried.
        sizes: Shortlist sizes to be tried.
        metric: What is to be best: ``"P@1"``, ``"RP"`` or ``"MAP@R"``.
        budget_ms: Largest median latency of a query.
    """

    labels: Path
    query_labels: Path | None = None
    alphas: Sequence[float] = ALPHAS
    sizes: Sequence[int] = SIZES
    metric: str = "MAP@R"
    budget_ms: float | None = None


def tune_queries(
    settings: TuneReranking, output: str | Path | None = None
) -> tuple[ResultRecord, TunedReranking]:
    """Try every alpha and shortlist size on labelled queries, and choose.

    Args:
        settings: What to search for, where, and what counts as right.
        output: Folder for the record and ``tradeoff.png``; ``None`` writes nothing.

    Raises:
        FileNotFoundError: If a file is missing, or a folder has no image.
        ValueError: If files and settings do not fit each other.
    """
    if output is not None:
        check_folder(output)
    if not settings.sizes:
        raise ValueError("sizes: expected at least one shortlist size, got none")
    for size in settings.sizes:
        check_positive("sizes", size)
    store = LocalFeatureStore.open(settings.store)
    label_of = read_label_table(settings.labels)
    queries = read_queries(settings, store)
    labels = _query_labels(settings, queries, label_of)
    relevant = _relevant(settings, queries, store, labels, label_of)
    stage = first_stage(settings, store, queries)
    depth = max(int(relevant.max()), *settings.sizes)
    most = len(store) - int(settings.exclude_self)
    deep = replace(settings, shortlist=min(depth, most))
    candidates = candidates_of(deep, stage, store, queries)
    tuned = tune_reranking(
        EMDReranker(store, matcher_of(settings, store), device=settings.device),
        queries.nodes,
        candidates,
        relevance(candidates, labels, label_of),
        relevant,
        alphas=settings.alphas,
        sizes=settings.sizes,
        metric=settings.metric,
        budget_ms=settings.budget_ms,
        stage=stage,
        query_vectors=queries.vectors,
    )
    record = ResultRecord(
        name="tune",
        title=f"alpha {tuned.alpha:g}, shortlist {tuned.shortlist} for {store.path.name}",
        tables={"settings": tuned.table},
        settings={
            **stage.describe(),
            **matcher_of(settings, store).describe(),
            "metric": settings.metric,
            "budget_ms": settings.budget_ms,
            "chosen": {"alpha": tuned.alpha, "shortlist": tuned.shortlist},
            "first_stage": dict(tuned.baseline),
        },
        data={
            "store": store.path.name,
            "images": len(store),
            "queries": settings.queries.name,
            "query_images": len(queries),
        },
        seed=0,
        notes=(
            f"Chosen by {tuned.metric}: alpha {tuned.alpha:g}, shortlist {tuned.shortlist}.",
            "The first stage alone: "
            + ", ".join(f"{name} {value:.1f}" for name, value in tuned.baseline.items())
            + ".",
            *_no_gain(tuned),
            "Chosen and measured on the same queries: what it gives on others is best measured on "
            "others.",
            *notes_of(queries),
        ),
    )
    if output is not None:
        figure = tradeoff_figure(
            tuned.table, tuned.metric, tuned.baseline[tuned.metric], (tuned.alpha, tuned.shortlist)
        )
        save_figure(figure, Path(output) / "tradeoff.png")
        record = record.with_figures(["tradeoff.png"])
        record.save(output)
    return record, tuned


def _no_gain(tuned: TunedReranking) -> tuple[str, ...]:
    """A word where no setting is better than what the first stage gives without the EMD."""
    alone = tuned.baseline[tuned.metric]
    if tuned.table[tuned.metric].max() > alone + AS_GOOD:
        return ()
    return (
        f"No setting gives {AS_GOOD:g} points more {tuned.metric} than the first stage alone: on "
        "these queries re-ranking does not pay.",
    )


def _query_labels(settings: TuneReranking, queries: Queries, label_of: dict[Any, Any]) -> list[Any]:
    known = label_of if settings.query_labels is None else read_label_table(settings.query_labels)
    missing = [name for name in queries.ids if name not in known]
    if missing:
        raise ValueError(
            f"query_labels: {len(missing)} of {len(queries)} queries have no label, the first is "
            f"{missing[0]!r}"
        )
    return [known[name] for name in queries.ids]


def _relevant(
    settings: TuneReranking,
    queries: Queries,
    store: LocalFeatureStore,
    labels: list[Any],
    label_of: dict[Any, Any],
) -> torch.Tensor:
    """R of each query: images of its class in the store, itself not counted if it is left out."""
    gallery = pd.Series([label_of.get(name) for name in np.asarray(store.ids).tolist()])
    if gallery.isna().any():
        raise ValueError(
            f"labels: {int(gallery.isna().sum())} of the {len(store)} images of {store.path.name} "
            "have none"
        )
    counts = gallery.value_counts()
    relevant = torch.tensor([int(counts.get(label, 0)) for label in labels])
    if settings.exclude_self:
        own = own_ids(queries, store)
        stored = store.contains(own).tolist()
        # Only what was counted is taken off: the gallery may have the query under another label.
        counted = [
            there and label_of[name] == label
            for name, there, label in zip(own.tolist(), stored, labels, strict=True)
        ]
        relevant -= torch.tensor(counted).long()
    return relevant
