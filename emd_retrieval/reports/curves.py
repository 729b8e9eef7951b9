"""Curves: shortlist size against metrics and latency."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg", force=False)

import pandas as pd
from matplotlib.figure import Figure

# Okabe-Ito blue, orange, green; markers repeat the distinction without colour.
_STYLES = {"P@1": ("#0072B2", "o"), "RP": ("#E69F00", "s"), "MAP@R": ("#009E73", "^")}


def shortlist_figure(curve: pd.DataFrame, raw: dict[str, float] | None = None) -> Figure:
    """Metrics (left) and latency a query (right) against the shortlist size.

    Args:
        curve: Columns ``shortlist``, ``P@1``, ``RP``, ``MAP@R`` (percent) and ``ms a query``.
        raw: The same metrics without re-ranking, drawn as dashed lines.

    Raises:
        ValueError: If a column is missing.
    """
    missing = {"shortlist", "ms a query", *_STYLES} - set(curve.columns)
    if missing:
        raise ValueError(f"curve: expected columns {sorted(missing)}, got {list(curve.columns)}")
    figure = Figure(figsize=(7.2, 2.9), dpi=150, layout="constrained")
    quality, latency = figure.subplots(1, 2)
    for metric, (color, marker) in _STYLES.items():
        quality.plot(curve["shortlist"], curve[metric], color=color, marker=marker, label=metric)
        if raw is not None:
            quality.axhline(raw[metric], color=color, linestyle="--", linewidth=0.9)
    if raw is not None:
        quality.plot([], [], color="#555555", linestyle="--", linewidth=0.9, label="Raw")
    quality.set(ylabel="percent")
    # Above the axes, where no curve can run through it.
    quality.legend(
        fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(-0.02, 1.0),
        columnspacing=1.2, handlelength=1.6,
    )  # fmt: skip
    latency.plot(curve["shortlist"], curve["ms a query"], color="#555555", marker="D")
    latency.set(ylabel="median latency a query (ms)", ylim=(0, None))
    labelled = _apart(curve["shortlist"].tolist())
    for axes in (quality, latency):
        axes.set(xscale="log", xlabel="shortlist size (images compared by EMD)")
        axes.set_xticks(labelled, [str(size) for size in labelled], fontsize=7)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _apart(sizes: list[int]) -> list[int]:
    """The sizes whose labels do not touch on a logarithmic axis, the last one for certain."""
    nearest = 0.12 * math.log(max(sizes) / min(sizes))
    kept: list[int] = []
    for size in reversed(sizes):
        if not kept or math.log(kept[-1] / size) > nearest:
            kept.append(size)
    return kept
