"""The charts of a result record: which ones its tables allow, each for any width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from emd_retrieval.records import ResultRecord
from emd_retrieval.reports.curves import shortlist_figure
from emd_retrieval.reports.fewshot import shots_figure
from emd_retrieval.reports.solvers import solvers_figure
from emd_retrieval.reports.table8 import table8_figure
from emd_retrieval.reports.tradeoff import tradeoff_figure

_SHOTS = 3  # numbers of support images that make a curve


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: Of its files.
        title: Heading above it.
        text: What it shows, for those who cannot see it.
        draw: From a width in inches to the figure.
    """

    name: str
    title: str
    text: str
    draw: Callable[[float], Figure]


def record_charts(record: ResultRecord) -> list[Chart]:
    """The charts that a record's tables allow; of most records none or one.

    Example:
        >>> table = pd.DataFrame({"size": ["9x9"], "solver": ["simplex"], "us, 1 thread": [1.0]})
        >>> record = ResultRecord("transport", "Time", {"time": table}, {}, {}, 0)
        >>> [chart.name for chart in record_charts(record)]
        ['solvers']
    """
    return list(_charts(record))


def _charts(record: ResultRecord) -> Iterator[Chart]:
    tables, settings = record.tables, record.settings
    if _has(tables, "table8", "loss", "method", "control", "metric", "gain", "paper_gain"):
        cells, means = tables["table8"], tables["mean gains"]
        if cells["gain"].notna().any():
            yield Chart(
                "table8",
                "Gains over Raw",
                "Gains over Raw by loss and metric with 95 % intervals, the paper's beside them; "
                "the numbers are in the table above.",
                lambda width: table8_figure(cells, means, width=width),
            )
    if _has(tables, "shortlist", "shortlist", "P@1", "RP", "MAP@R", "ms a query"):
        raw = _raw(tables)
        yield Chart(
            "shortlist",
            "Shortlist trade-off",
            "Metrics and milliseconds a query against the size of the shortlist; the numbers are "
            "in the table above.",
            lambda width: shortlist_figure(tables["shortlist"], raw, width=width),
        )
    if _has(tables, "settings", "alpha", "shortlist", "ms a query") and "chosen" in settings:
        metric, chosen = settings["metric"], settings["chosen"]
        yield Chart(
            "tradeoff",
            "Alpha and shortlist",
            "The metric against alpha and against latency, a line a shortlist size; the numbers "
            "are in the table above.",
            lambda width: tradeoff_figure(
                tables["settings"],
                metric,
                settings["first_stage"][metric],
                (chosen["alpha"], chosen["shortlist"]),
                width=width,
            ),
        )
    if (
        _has(tables, "cells", "row", "shot", "accuracy", "interval")
        and tables["cells"]["shot"].nunique() >= _SHOTS
    ):
        yield Chart(
            "shots",
            "Accuracy by support images",
            "Accuracy against the number of support images a class, a line a classifier, with 95 % "
            "intervals; the numbers are in the table above.",
            lambda width: shots_figure(tables["cells"], width=width),
        )
    if _has(tables, "time", "size", "solver"):
        yield Chart(
            "solvers",
            "Solver speed",
            "Microseconds a transportation problem against its size, a line a solver; the numbers "
            "are in the table above.",
            lambda width: solvers_figure(tables["time"], width=width),
        )


def _raw(tables: Mapping[str, pd.DataFrame]) -> dict[str, float] | None:
    """The metrics without re-ranking, where the main table has them."""
    main = next(iter(tables))
    if not _has(tables, main, "method", "metric", "value"):
        return None
    table = tables[main]
    raw = table[table["method"] == "Raw"]
    return {str(k): float(v) for k, v in zip(raw["metric"], raw["value"], strict=True)} or None


def _has(tables: Mapping[str, pd.DataFrame], name: str, *columns: str) -> bool:
    return name in tables and set(columns) <= set(tables[name].columns)
