"""Figure 7: the full optimal flow between two images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from emd_retrieval.reports.match import Float, Image, MatchPicture, lit_by_weights

_ROW = 3.1  # inches
# From dark to light in one direction, so that costs are told apart without colour.
_COSTS = "viridis"


# Dollar signs in the name of a class or file are no formula.
@matplotlib.rc_context({"text.parse_math": False})
def flows_figure(matches: Sequence[MatchPicture], *, least: float = 0.002) -> Figure:
    """Draw all flows of matches: a line's width is the mass, its colour the ground cost.

    As in Figure 7 of the paper; node weights are light, and the size of the dots.

    Args:
        matches: One row each.
        least: Flows below this share of the mass are left out.

    Raises:
        ValueError: If there are no matches.
    """
    if not matches:
        raise ValueError("matches: expected at least one, got none")
    figure = Figure(figsize=(6.8, _ROW * len(matches)), dpi=150, layout="constrained")
    grid = figure.subplots(len(matches), 2, squeeze=False)
    moving = [match.cost[match.flow >= least] for match in matches]
    costs = np.concatenate([*moving, np.zeros(1)])
    scale = ScalarMappable(Normalize(0.0, max(1e-6, float(costs.max()))), cmap=_COSTS)
    for (left, right), match in zip(grid, matches, strict=True):
        others = match.boxes if match.reference_boxes is None else match.reference_boxes
        starts = _nodes(left, match.query, match.boxes, match.query_weights)
        ends = _nodes(right, match.reference, others, match.reference_weights)
        # The long line above the left picture has the whole width to itself.
        about = f"{match.title}, similarity {match.similarity:.3f}"
        for axes, title in ((left, f"{about}\nquery"), (right, "reference")):
            axes.set_title(title, fontsize=7.5, loc="left", pad=3).set_in_layout(axes is left)
        most = max(float(match.flow.max()), 1e-9)
        # The largest last: it lies on top.
        order = np.argsort(match.flow, axis=None, kind="stable")
        for i, j in zip(*np.unravel_index(order, match.flow.shape), strict=True):
            mass = float(match.flow[i, j])
            if mass < least:
                continue
            line = ConnectionPatch(
                starts[i], ends[j], left.transData, right.transData,
                color=scale.to_rgba(match.cost[i, j : j + 1])[0], linewidth=0.4 + 2.4 * mass / most,
                alpha=0.85, capstyle="round",
            )  # fmt: skip
            # Lines are no part of the layout, which would make room for them.
            line.set_in_layout(False)
            figure.add_artist(line)
    bar = figure.colorbar(scale, ax=grid, location="bottom", shrink=0.4, aspect=40, pad=0.02)
    bar.set_label("ground cost of a flow (its width: mass moved)", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return figure


def _nodes(axes: Any, image: Image, boxes: Float, weights: Float) -> Float:
    """Draw an image with its nodes; returns their middles in pixels. Shape: ``[N, 2]``."""
    height, width = image.shape[:2]
    middles: Float = (boxes[:, :2] + boxes[:, 2:]) / 2 * np.array([width, height])
    axes.imshow(lit_by_weights(image, boxes, weights))
    axes.set_axis_off()
    sizes = 4 + 40 * weights / max(float(weights.max()), 1e-9)
    style = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.6}
    axes.scatter(*middles.T, s=sizes, zorder=3, **style)
    return middles
