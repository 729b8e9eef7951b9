"""The trade-off figure: alpha and shortlist size against a metric and latency."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg", force=False)

import pandas as pd
from matplotlib.figure import Figure

# Okabe-Ito; markers repeat the distinction without colour.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "os^Dv*"


def tradeoff_figure(
    table: pd.DataFrame, metric: str, baseline: float, chosen: tuple[float, int]
) -> Figure:
    """A metric against alpha (left) and against latency (right), a line a shortlist size.

    Args:
        table: Columns ``alpha``, ``shortlist``, ``metric`` and ``ms a query``.
        metric: The column that is drawn, in percent.
        baseline: The metric of the first stage alone, drawn dashed.
        chosen: Alpha and shortlist size, drawn with a ring.

    Raises:
        ValueError: If a column is missing.
    """
    missing = {"alpha", "shortlist", "ms a query", metric} - set(table.columns)
    if missing:
        raise ValueError(f"table: expected columns {sorted(missing)}, got {list(table.columns)}")
    figure = Figure(figsize=(7.2, 3.0), dpi=150, layout="constrained")
    mixing, cost = figure.subplots(1, 2)
    for number, (size, part) in enumerate(table.groupby("shortlist")):
        style = {
            "color": _COLORS[number % len(_COLORS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 4,
        }
        mixing.plot(part["alpha"], part[metric], label=str(size), **style)
        best = part.sort_values(metric, ascending=False, kind="stable").iloc[0]
        cost.plot(best["ms a query"], best[metric], linestyle="", **style)
        cost.annotate(f"{size}, alpha {best['alpha']:g}", (best["ms a query"], best[metric]),
                      xytext=(4, 4), textcoords="offset points", fontsize=6)  # fmt: skip
    ring = table[(table["alpha"] == chosen[0]) & (table["shortlist"] == chosen[1])]
    look = {"s": 130, "facecolors": "none", "edgecolors": "black", "zorder": 3}
    mixing.scatter(ring["alpha"], ring[metric], **look)
    cost.scatter(ring["ms a query"], ring[metric], **look)
    mixing.set(xlabel="alpha (0: first stage's score, 1: EMD)", ylabel=f"{metric} (percent)")
    cost.set(xlabel="median latency a query (ms)", xlim=(0, None))
    cost.margins(x=0.25, y=0.15)
    mixing.legend(title="shortlist", fontsize=7, title_fontsize=7, frameon=False)
    for axes in (mixing, cost):
        axes.axhline(baseline, color="#555555", linestyle="--", linewidth=0.9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    cost.set_title("dashed: first stage alone; ring: chosen", fontsize=8)
    return figure
