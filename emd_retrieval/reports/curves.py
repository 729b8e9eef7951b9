"""Curves: shortlist size against metrics and latency."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from emd_retrieval.reports.style import (
    CHART,
    PAGE,
    QUIET,
    is_narrow,
    legend_above,
    line_style,
    number_ticks,
    panels,
)

_METRICS = ("P@1", "RP", "MAP@R")


@rc_context(CHART)
def shortlist_figure(
    curve: pd.DataFrame, raw: dict[str, float] | None = None, *, width: float = PAGE
) -> Figure:
    """Metrics and latency a query against the shortlist size.

    Args:
        curve: Columns ``shortlist``, ``P@1``, ``RP``, ``MAP@R`` (percent) and ``ms a query``.
        raw: The same metrics without re-ranking; with them the gains over them are drawn.
        width: In inches; the panels of a narrow figure lie below each other.

    Raises:
        ValueError: If a column is missing.
    """
    missing = {"shortlist", "ms a query", *_METRICS} - set(curve.columns)
    if missing:
        raise ValueError(f"curve: expected columns {sorted(missing)}, got {list(curve.columns)}")
    figure, (quality, latency) = panels(2, width, 2.3)
    for number, metric in enumerate(_METRICS):
        # Metrics lie far apart, what re-ranking changes in each does not.
        less, label = (0.0, metric) if raw is None else (raw[metric], _named(metric, raw))
        quality.plot(curve["shortlist"], curve[metric] - less, label=label, **line_style(number))
    if raw is None:
        quality.set(ylabel="percent")
    else:
        quality.axhline(0, color=QUIET, linestyle="--", linewidth=0.9)
        quality.set(ylabel="gain over Raw (percent points)")
    legend_above(quality, 2 if is_narrow(width) else 3)
    latency.plot(curve["shortlist"], curve["ms a query"], color=QUIET, marker="D")
    latency.set(ylabel="median latency a query (ms)", ylim=(0, None))
    labelled = _apart(curve["shortlist"].tolist())
    for axes in (quality, latency):
        axes.set(xscale="log")
        number_ticks(axes, labelled)
        if axes is latency or not is_narrow(width):
            axes.set(xlabel="shortlist size (images compared by EMD)")
    return figure


def _named(metric: str, raw: dict[str, float]) -> str:
    return f"{metric} (Raw {raw[metric]:.1f})"


def _apart(sizes: list[int]) -> list[int]:
    """The sizes whose labels do not touch on a logarithmic axis, the last one for certain."""
    nearest = 0.12 * math.log(max(sizes) / min(sizes))
    kept: list[int] = []
    for size in reversed(sizes):
        if not kept or math.log(kept[-1] / size) > nearest:
            kept.append(size)
    return kept
