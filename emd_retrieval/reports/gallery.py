"""The gallery figure: queries, and their neighbours before and after re-ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

Image = NDArray[np.uint8]

# Okabe-Ito: told apart by colour-blind readers; the mark repeats it without colour.
RIGHT_COLOR, WRONG_COLOR = "#009E73", "#D55E00"


@dataclass(frozen=True)
class Neighbour:
    """One answer: its picture, whether it is of the query's class, and its class."""

    image: Image
    right: bool
    label: str


@dataclass(frozen=True)
class GalleryRow:
    """One query with its answers under both methods, best first.

    Attributes:
        query: The query's picture. Shape: ``[h, w, 3]``, uint8.
        label: The query's class.
        caption: A few words under the query, for instance its MAP@R before and after.
        before: Neighbours by the first method.
        after: Neighbours by the second method.
    """

    query: Image
    label: str
    caption: str
    before: Sequence[Neighbour]
    after: Sequence[Neighbour]


# Dollar signs in the name of a class or folder are no formula.
@matplotlib.rc_context({"text.parse_math": False})
def gallery_figure(
    rows: Sequence[GalleryRow], *, before: str = "Raw", after: str = "DeepEMD", title: str = ""
) -> Figure:
    """Draw queries with their neighbours before and after re-ranking, right and wrong marked.

    Args:
        rows: What to show; all with the same numbers of neighbours.
        before: Name of the first method.
        after: Name of the second method.
        title: A line above.

    Raises:
        ValueError: If there are no rows, or their numbers of neighbours differ.
    """
    if not rows:
        raise ValueError("rows: expected at least one query to show, got none")
    widths = {(len(row.before), len(row.after)) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"rows: expected the same numbers of neighbours, got {sorted(widths)}")
    left, right = widths.pop()
    # Query, a gap, the neighbours before, a gap, the neighbours after.
    ratios = [1.15, 0.18, *[1.0] * left, 0.3, *[1.0] * right]
    figure = Figure(figsize=(1.12 * sum(ratios), 1.42 * len(rows) + 0.75), dpi=150)
    grid = figure.add_gridspec(
        len(rows), len(ratios), width_ratios=ratios, wspace=0.06, hspace=0.34,
        left=0.01, right=0.99, bottom=0.03,
        top=1 - (0.62 if title else 0.46) / (1.42 * len(rows) + 0.75),
    )  # fmt: skip
    for number, row in enumerate(rows):
        axes = figure.add_subplot(grid[number, 0])
        _show(axes, row.query)
        # Left, so that what is wider than the picture runs into the gap and not off the page.
        axes.set_title(short_label(row.label), fontsize=6.5, pad=3, loc="left")
        axes.set_xlabel(row.caption, fontsize=6, labelpad=2, loc="left")
        for first, neighbours in ((2, row.before), (3 + left, row.after)):
            for place, neighbour in enumerate(neighbours):
                axes = figure.add_subplot(grid[number, first + place])
                _show_neighbour(axes, neighbour)
                if number == 0 and place == 0:
                    name = before if first == 2 else after
                    axes.annotate(
                        name, (0, 1), xytext=(0, 14), xycoords="axes fraction",
                        textcoords="offset points", fontsize=9, weight="bold",
                    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", y=0.995, va="top")
    return figure


def _show(axes: Any, image: Image) -> None:
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)


def _show_neighbour(axes: Any, neighbour: Neighbour) -> None:
    _show(axes, neighbour.image)
    color, mark = (RIGHT_COLOR, "✓") if neighbour.right else (WRONG_COLOR, "✗")
    for spine in axes.spines.values():
        spine.set(edgecolor=color, linewidth=2.2)
    axes.add_patch(
        Rectangle((0, 0.8), 0.2, 0.2, transform=axes.transAxes, facecolor=color, linewidth=0)
    )
    axes.text(
        0.1, 0.89, mark, transform=axes.transAxes, color="white", fontsize=7,
        ha="center", va="center", weight="bold", family="DejaVu Sans",
    )  # fmt: skip
    if not neighbour.right:
        axes.set_xlabel(short_label(neighbour.label, 20), fontsize=5, labelpad=1.5)


def short_label(text: str, most: int = 26) -> str:
    """A class name as people read it: ``001.Black_footed_Albatross`` without number and bars."""
    text = text.split(".", 1)[-1].replace("_", " ") if text[:1].isdigit() else text
    return text if len(text) <= most else text[: most - 1] + "…"
