"""How charts look: two widths, colours that colour-blind readers tell apart, quiet axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)

from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.8
"""Inches: a column of a two-column paper, and its text block."""

# Okabe-Ito without yellow, which is too light for lines; markers repeat the distinction.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "os^Dv*P"
QUIET = "#555555"

CHART: Any = {
    "font.size": 7.5, "axes.labelsize": 7.5, "axes.titlesize": 8, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7, "legend.title_fontsize": 7,
    "legend.frameon": False, "legend.handlelength": 1.8, "legend.columnspacing": 1.3,
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#b8bec6", "grid.alpha": 0.45, "grid.linewidth": 0.6,
    "lines.linewidth": 1.4, "lines.markersize": 4.2, "errorbar.capsize": 2.0,
    # Dollar signs in the name of a class, run or file are no formula.
    "text.parse_math": False,
}  # fmt: skip
"""The look of all charts, for :func:`matplotlib.rc_context`."""


def panels(
    count: int, width: float, height: float, *, most: int | None = None, **options: Any
) -> tuple[Figure, list[Any]]:
    """A figure with axes side by side, or below each other where it is narrow.

    Args:
        count: How many axes.
        width: Of the figure, in inches.
        height: Of one row, in inches.
        most: Axes side by side at most, where it is wide; all by default.
        options: For :meth:`matplotlib.figure.Figure.subplots`.

    Raises:
        ValueError: If the width is not a positive number.
    """
    if not 0 < width < math.inf:
        raise ValueError(f"width: expected inches above zero, got {width}")
    columns = 1 if is_narrow(width) else min(count, most or count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width, rows * height), dpi=200, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, list(grid[:count])


def is_narrow(width: float) -> bool:
    """Whether panels go below each other."""
    return width < 5.0


def line_style(number: int) -> dict[str, str]:
    """Colour and marker of the line of this number."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def legend_above(axes: Any, columns: int, **options: Any) -> None:
    """A legend above the axes, where no curve can run through it; it may be wider than they are."""
    legend = axes.legend(
        ncols=columns, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2, **options
    )
    # Part of the layout in height only: the title above reserves it, the width would shrink axes.
    rows = -(-len(legend.get_texts()) // columns) + bool(legend.get_title().get_text())
    legend.set_in_layout(False)
    axes.set_title("\n" * (rows - 1) + " ", fontsize=8.5, pad=6)


def number_ticks(axes: Any, numbers: Sequence[float]) -> None:
    """Label these places of a logarithmic x axis with plain numbers."""
    axes.set_xticks(list(numbers), [f"{number:g}" for number in numbers])
    axes.minorticks_off()
