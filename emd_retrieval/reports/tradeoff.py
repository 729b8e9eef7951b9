"""The trade-off figure: alpha and shortlist size against a metric and latency."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from emd_retrieval.reports.style import (
    CHART,
    PAGE,
    QUIET,
    legend_above,
    line_style,
    panels,
)

_WIDE = 4.0
"""From so many times the least latency on, the axis is logarithmic."""


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
        best = part.sort_values(metric, ascending=False, kind="stable").iloc[0]
        mixing.plot(part["alpha"], part[metric], label=f"{size} ({best['alpha']:g})", **style)
        cost.plot(best["ms a query"], best[metric], linestyle="", **style)
        own = part[part["alpha"] == chosen[0]]
        if size == chosen[1] and len(own):
            cost.plot(own["ms a query"], own[metric], linestyle="", **style)
        # By turns above and below: settings of equal worth and close latency stay legible.
        cost.annotate(str(size), (best["ms a query"], best[metric]), ha="center",
                      va="top" if number % 2 else "bottom", fontsize=6,
                      xytext=(0, -6 if number % 2 else 6), textcoords="offset points")  # fmt: skip
    ring = table[(table["alpha"] == chosen[0]) & (table["shortlist"] == chosen[1])]
    look = {"s": 110, "facecolors": "none", "edgecolors": "black", "zorder": 3, "linewidths": 1.0}
    mixing.scatter(ring["alpha"], ring[metric], **look)
    cost.scatter(ring["ms a query"], ring[metric], **look)
    mixing.set(xlabel="alpha (0: first stage's score, 1: EMD)", ylabel=f"{metric} (percent)")
    cost.set(xlabel="median latency a query (ms)", ylabel=f"{metric} (percent)")
    latency = table["ms a query"]
    if latency.min() > 0 and latency.max() > _WIDE * latency.min():
        cost.set_xscale("log")
        cost.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        cost.xaxis.set_major_formatter("{x:g}")
        cost.xaxis.set_minor_formatter(NullFormatter())
        cost.margins(x=0.1)
    else:
        cost.set_xlim(0, 1.15 * float(latency.max()))
    cost.margins(y=0.2)
    legend_above(mixing, 3, title="shortlist (its best alpha)", alignment="left")
    for axes in (mixing, cost):
        axes.axhline(baseline, color=QUIET, linestyle="--", linewidth=0.9)
    cost.set_title("dashed: first stage alone; ring: chosen", loc="left", fontsize=7)
    return figure
