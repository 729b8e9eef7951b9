"""The trade-off figure: alpha and shortlist size against a metric and latency."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from emd_retrieval.reports.style import (
    CHART,
    PAGE,
    QUIET,
    legend_above,
    line_style,
    panels,
)


@rc_context(CHART)
def tradeoff_figure(
    table: pd.DataFrame,
    metric: str,
    baseline: float,
    chosen: tuple[float, int],
    *,
    width: float = PAGE,
) -> Figure:
    """A metric against alpha and against latency, a line a shortlist size.

    Args:
        table: Columns ``alpha``, ``shortlist``, ``metric`` and ``ms a query``.
        metric: The column that is drawn, in percent.
        baseline: The metric of the first stage alone, drawn dashed.
        chosen: Alpha and shortlist size, drawn with a ring.
        width: In inches; the panels of a narrow figure lie below each other.

    Raises:
        ValueError: If a column is missing.
    """
    missing = {"alpha", "shortlist", "ms a query", metric} - set(table.columns)
    if missing:
        raise ValueError(f"table: expected columns {sorted(missing)}, got {list(table.columns)}")
    figure, (mixing, cost) = panels(2, width, 2.4)
    for number, (size, part) in enumerate(table.groupby("shortlist")):
        style = line_style(number)
        mixing.plot(part["alpha"], part[metric], label=str(size), **style)
        best = part.sort_values(metric, ascending=False, kind="stable").iloc[0]
        cost.plot(best["ms a query"], best[metric], linestyle="", **style)
        cost.annotate(f"{size}, alpha {best['alpha']:g}", (best["ms a query"], best[metric]),
                      xytext=(4, 4), textcoords="offset points", fontsize=6)  # fmt: skip
    ring = table[(table["alpha"] == chosen[0]) & (table["shortlist"] == chosen[1])]
    look = {"s": 110, "facecolors": "none", "edgecolors": "black", "zorder": 3, "linewidths": 1.0}
    mixing.scatter(ring["alpha"], ring[metric], **look)
    cost.scatter(ring["ms a query"], ring[metric], **look)
    mixing.set(xlabel="alpha (0: first stage's score, 1: EMD)", ylabel=f"{metric} (percent)")
    cost.set(xlabel="median latency a query (ms)", ylabel=f"{metric} (percent)")
    # Room for the words beside the marks.
    cost.set_xlim(0, 1.35 * float(table["ms a query"].max()))
    cost.margins(y=0.15)
    legend_above(mixing, 6, title="shortlist", alignment="left")
    for axes in (mixing, cost):
        axes.axhline(baseline, color=QUIET, linestyle="--", linewidth=0.9)
    cost.set_title("dashed: first stage alone; ring: chosen", loc="left", fontsize=7)
    return figure
