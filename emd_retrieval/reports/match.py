"""The match figure: which part of one image matched which part of the other, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Float = NDArray[np.floating[Any]]

# Okabe-Ito without black: pairs are told apart by colour and by the number in the corner.
_COLORS = ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#D55E00")


@dataclass(frozen=True)
class MatchPicture:
    """One match as a picture needs it; everything in it was computed elsewhere.

    Attributes:
        query: Shape: ``[h, w, 3]``, uint8.
        reference: Shape: ``[h, w, 3]``, uint8.
        boxes: Left, top, right, bottom of each query node, as shares of the image. Shape:
            ``[N, 4]``.
        query_weights: Sum to one. Shape: ``[N]``.
        reference_weights: Sum to one. Shape: ``[M]``.
        flow: Sums to one. Shape: ``[N, M]``.
        cost: Ground costs. Shape: ``[N, M]``.
        similarity: Of the whole match.
        title: What the two images are.
        reference_boxes: The same of the reference's nodes; ``boxes`` by default. Shape:
            ``[M, 4]``.
    """

    query: Image
    reference: Image
    boxes: Float
    query_weights: Float
    reference_weights: Float
    flow: Float
    cost: Float
    similarity: float
    title: str
    reference_boxes: Float | None = None


# Dollar signs in the name of a class or folder are no formula.
@matplotlib.rc_context({"text.parse_math": False})
def match_figure(matches: Sequence[MatchPicture], *, pairs: int = 4) -> Figure:
    """Draw matches: node weights as light, the largest flows as paired boxes.

    Args:
        matches: One row each.
        pairs: How many flows to draw, the largest first; a part is drawn once.

    Raises:
        ValueError: If there are no matches.
    """
    if not matches:
        raise ValueError("matches: expected at least one, got none")
    figure = Figure(figsize=(6.8, 2.75 * len(matches)), dpi=150)
    grid = figure.add_gridspec(
        len(matches), 3, width_ratios=[1, 1, 0.72], wspace=0.1, hspace=0.22,
        left=0.01, right=0.99, bottom=0.02, top=1 - 0.3 / (2.75 * len(matches)),
    )  # fmt: skip
    for row, match in enumerate(matches):
        left, right, text = (figure.add_subplot(grid[row, column]) for column in range(3))
        _draw(figure, left, right, text, match, pairs)
    return figure


def largest_flows(
    flow: Float, boxes: Float, count: int, reference_boxes: Float | None = None
) -> list[tuple[int, int]]:
    """The largest flows between parts that are not mostly a part drawn before.

    A node of the whole image says nothing about parts and is left out.

    Args:
        flow: Shape: ``[N, M]``.
        boxes: Of the query's nodes. Shape: ``[N, 4]``.
        count: At most so many.
        reference_boxes: Of the reference's nodes; ``boxes`` by default. Shape: ``[M, 4]``.

    Returns:
        Pairs of nodes, the largest flow first.
    """
    others = boxes if reference_boxes is None else reference_boxes
    whole, other_whole = box_areas(boxes) > 0.99, box_areas(others) > 0.99
    order = np.argsort(-flow, axis=None, kind="stable")
    chosen: list[tuple[int, int]] = []
    for place in order:
        i, j = divmod(int(place), flow.shape[1])
        if len(chosen) == count or flow[i, j] <= 0:
            break
        if whole[i] or other_whole[j]:
            continue
        if any(_same(boxes[i], boxes[a]) or _same(others[j], others[b]) for a, b in chosen):
            continue
        chosen.append((i, j))
    return chosen


def _draw(
    figure: Figure, left: Any, right: Any, text: Any, match: MatchPicture, pairs: int
) -> None:
    others = match.boxes if match.reference_boxes is None else match.reference_boxes
    left.imshow(lit_by_weights(match.query, match.boxes, match.query_weights))
    right.imshow(lit_by_weights(match.reference, others, match.reference_weights))
    for axes in (left, right, text):
        axes.set_axis_off()
    left.set_title(match.title, fontsize=7.5, loc="left", pad=4)
    lines = [f"similarity {match.similarity:.3f}", ""]
    for number, (i, j) in enumerate(largest_flows(match.flow, match.boxes, pairs, others)):
        color = _COLORS[number % len(_COLORS)]
        start = _mark(left, match.query, match.boxes[i], number + 1, color)
        end = _mark(right, match.reference, others[j], number + 1, color)
        # From the near edge of one box to the near edge of the other, so that parts stay visible.
        ends = (start[1], start[2]), (end[0], end[2])
        line = ConnectionPatch(*ends, left.transData, right.transData, color=color, alpha=0.85)
        figure.add_artist(line)
        # Adding zero takes the sign off a cost of -0.00.
        share, cost = 100 * match.flow[i, j], round(float(match.cost[i, j]), 2) + 0.0
        lines.append(f"{number + 1}   {share:.0f} % of the mass, cost {cost:.2f}")
    lines += ["", "light: node weight", "boxes: largest flows", "between parts"]
    text.text(0.0, 0.98, "\n".join(lines), fontsize=6.5, va="top", linespacing=1.5)


def _mark(
    axes: Any, image: Image, box: Float, number: int, color: str
) -> tuple[float, float, float]:
    """Frame a part and number it; returns its left, right and middle height in pixels."""
    x0, y0, x1, y1 = box * np.array([*image.shape[1::-1]] * 2)
    inset = 0.012 * image.shape[1]
    width, height = x1 - x0 - 2 * inset, y1 - y0 - 2 * inset
    frame = Rectangle((x0 + inset, y0 + inset), width, height, fill=False, edgecolor=color)
    frame.set_linewidth(1.8)
    axes.add_patch(frame)
    badge = {"facecolor": color, "edgecolor": "none", "pad": 1.2}
    corner = x0 + 2.5 * inset, y0 + 2.5 * inset
    axes.text(*corner, str(number), color="black", fontsize=6, va="top", bbox=badge)
    return x0 + inset, x1 - inset, (y0 + y1) / 2


def lit_by_weights(image: Image, boxes: Float, weights: Float) -> Image:
    """The image, brighter where nodes weigh more than an equal share and darker where less."""
    height, width = image.shape[:2]
    light = np.zeros((height, width))
    for (x0, y0, x1, y1), weight in zip(boxes, weights, strict=True):
        rows = slice(round(y0 * height), round(y1 * height))
        columns = slice(round(x0 * width), round(x1 * width))
        light[rows, columns] += weight / max(1e-9, (x1 - x0) * (y1 - y0))
    light = light / max(light.max(), 1e-9)
    lit = image * (0.35 + 0.65 * light[..., None])
    pixels: Image = lit.round().clip(0, 255).astype(np.uint8)
    return pixels


def box_areas(boxes: Float) -> Float:
    """Areas as shares of the image. Shape: ``[..., 4] -> [...]``."""
    areas: Float = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return areas


def _same(a: Float, b: Float) -> bool:
    """Whether two boxes show much the same: intersection over union above a third."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return bool(shared > (box_areas(a) + box_areas(b) - shared) / 3)
