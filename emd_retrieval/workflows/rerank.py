"""``rerank``: the candidates of an existing index, in the order of their EMD, as a table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emd_retrieval._checks import check_choice, check_positive
from emd_retrieval._files import check_folder, whole_file
from emd_retrieval._tables import as_utf8
from emd_retrieval.records import ResultRecord
from emd_retrieval.retrieval import (
    Candidates,
    EMDReranker,
    LocalFeatureStore,
    Reranking,
    Shortlist,
)
from emd_retrieval.workflows.explorer import EXPLORER_FILE
from emd_retrieval.workflows.queries import (
    Queries,
    SearchSettings,
    first_stage,
    matcher_of,
    own_ids,
    read_queries,
    skipped_table,
)
from emd_retrieval.workflows.report import write_report
from emd_retrieval.workflows.rerank_explorer import collect_reranking


@dataclass(frozen=True, kw_only=True)
class RerankQueries(SearchSettings):
    """Settings of :func:`rerank_queries`, besides those of :class:`SearchSettings`.

    Attributes:
        k: Answers a query; at most ``shortlist``.
        alpha: Share of the EMD in ``alpha * similarity + (1 - alpha) * first stage's score``.
        format: Of the ranking: ``"parquet"`` or ``"csv"``.
        report: Queries to keep for the explorer of ``report.html``, which is written as well;
            ``None`` keeps none and writes no page.
        images: The store's images (folder, list or table), for the pictures of the page.
    """

    k: int = 10
    alpha: float = 1.0
    format: str = "parquet"
    report: int | None = None
    images: Path | None = None


def rerank_queries(
    settings: RerankQueries, output: str | Path | None = None
) -> tuple[ResultRecord, pd.DataFrame]:
    """Search a first stage, re-rank its answers by EMD, and write them down.

    Args:
        settings: What to search for, and where.
        output: Folder for ``ranking.parquet`` (or ``.csv``), the record, and the list of images
            that were left out; ``None`` writes nothing. A run that fails leaves what is there.

    Returns:
        The record, and the ranking: ``query``, ``rank`` (from 1), ``id``, ``similarity``,
        ``score``.

    Raises:
        FileNotFoundError: If a file is missing, or a folder has no image.
        UnreadableImageError: If a query cannot be decoded and ``skip_errors`` is not set.
        ValueError: If store, index, queries and settings do not fit each other.
    """
    check_choice("format", settings.format, ["parquet", "csv"])
    check_sizes(settings.k, settings.shortlist)
    check_alpha(settings.alpha)
    if settings.report is not None:
        check_positive("report", settings.report)
    elif settings.images is not None:
        raise ValueError("images: they are for the page; ask for it (report, --report)")
    if output is not None:
        check_folder(output)
    store = LocalFeatureStore.open(settings.store)
    queries = read_queries(settings, store)
    stage = first_stage(settings, store, queries)

    start = time.perf_counter()
    first = candidates_of(settings, stage, store, queries)
    middle = time.perf_counter()
    answer = rerank(settings, store, queries, first)
    end = time.perf_counter()

    ranking = ranking_table(queries, answer)
    summary = pd.DataFrame(
        {
            "queries": [len(queries)],
            "candidates a query": [answer.compared / max(1, len(queries))],
            "answers": [len(ranking)],
            "first stage, ms a query": [1e3 * (middle - start) / len(queries)],
            "re-ranking, ms a query": [1e3 * (end - middle) / len(queries)],
            "candidates not solved, %": [100 * answer.skipped],
        }
    )
    record = ResultRecord(
        name="rerank",
        title=f"{settings.queries.name} re-ranked by EMD from {store.path.name}",
        tables={"rerank": summary},
        settings={
            **stage.describe(),
            **matcher_of(settings, store).describe(),
            "shortlist": settings.shortlist,
            "k": settings.k,
            "alpha": settings.alpha,
            "exclude_self": settings.exclude_self,
        },
        data={
            "store": store.path.name,
            "images": len(store),
            "codec": store.manifest.codec,
            "queries": settings.queries.name,
            "query_images": len(queries),
        },
        seed=0,
        notes=notes_of(queries),
    )
    if output is not None:
        save_ranking(ranking, Path(output), settings.format)
        save_skipped(queries, Path(output))
        if settings.report is not None:
            explorer = collect_reranking(
                settings, store, queries, first, answer, images=settings.images,
                most=settings.report,
            )  # fmt: skip
            explorer.save(Path(output) / EXPLORER_FILE)
        record.save(output)
        if settings.report is not None:
            write_report(output)
    return record, ranking


def check_sizes(k: int, shortlist: int) -> None:
    """Raise unless an answer fits into the shortlist."""
    check_positive("k", k)
    check_positive("shortlist", shortlist)
    if k > shortlist:
        raise ValueError(
            f"k: {k} answers do not fit into a shortlist of {shortlist}; ask for a longer shortlist"
        )


def check_alpha(alpha: float) -> None:
    """Raise unless it is a share, before anything is read or extracted."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")


def candidates_of(
    settings: SearchSettings, stage: Shortlist, store: LocalFeatureStore, queries: Queries
) -> Candidates:
    """What the first stage hands over, the queries themselves left out if asked for.

    Raises:
        ValueError: If it cannot give a single candidate.
    """
    if not settings.exclude_self:
        return stage.search(queries.vectors, settings.shortlist)
    own = own_ids(queries, store)
    found = stage.search(queries.vectors, settings.shortlist + 1)
    return found.without(own).top(settings.shortlist)


def rerank(
    settings: RerankQueries, store: LocalFeatureStore, queries: Queries, first: Candidates
) -> Reranking:
    """Re-rank the candidates as the settings have it."""
    depth = first.ids.shape[1]
    if settings.k > depth:
        raise ValueError(
            f"k: expected at most {depth}, as many candidates as there are, got {settings.k}"
        )
    if settings.alpha < 1 and first.scores is None:
        raise ValueError(
            f"alpha: expected 1, as {settings.candidates} has no scores (column or array 'score', "
            f"'scores') to be mixed in, got {settings.alpha:g}"
        )
    reranker = EMDReranker(store, matcher_of(settings, store), device=settings.device)
    return reranker.rerank(
        queries.nodes.numpy(),
        first.ids,
        first.scores,
        settings.k,
        alpha=settings.alpha,
        description="re-ranking",
    )


def ranking_table(queries: Queries, answer: Reranking) -> pd.DataFrame:
    """A row an answer; places for which there was no candidate are left out."""
    ids: Any = answer.ids
    query, place = np.nonzero(answer.similarities > -np.inf)
    names = np.asarray(queries.ids)
    return pd.DataFrame(
        {
            "query": _column(names[query]),
            "rank": place + 1,
            "id": _column(ids[query, place]),
            "similarity": answer.similarities[query, place],
            "score": answer.scores[query, place],
        }
    )


def _column(values: Any) -> pd.Series[Any]:
    """Ids as a column; names of files that are no UTF-8 only fit as Python's own text."""
    try:
        return pd.Series(values)
    except UnicodeEncodeError:
        return pd.Series(values, dtype=object)


def notes_of(queries: Queries) -> tuple[str, ...]:
    """What a record says of images that were left out."""
    if not queries.skipped:
        return ()
    return (
        f"{len(queries.skipped)} query images could not be read and are left out (skipped.csv).",
    )


def save_ranking(ranking: pd.DataFrame, output: Path, suffix: str) -> None:
    """Write the ranking, whole or not at all; one that an earlier run left otherwise goes."""
    with whole_file(output / f"ranking.{suffix}") as partial:
        if suffix == "csv":
            as_utf8(ranking).to_csv(partial, index=False)
        else:
            as_utf8(ranking).to_parquet(partial, index=False, write_page_checksum=True)
    for other in {"csv", "parquet"} - {suffix}:
        (output / f"ranking.{other}").unlink(missing_ok=True)


def save_skipped(queries: Queries, output: Path) -> None:
    """List the images that were left out; a list of an earlier run goes."""
    file = output / "skipped.csv"
    if not queries.skipped:
        file.unlink(missing_ok=True)
        return
    with whole_file(file) as partial:
        as_utf8(skipped_table(queries.skipped)).to_csv(partial, index=False)
