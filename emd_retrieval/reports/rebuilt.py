"""Figure 6: one image rebuilt from the best-matched parts of another."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg", force=False)

import numpy as np
from matplotlib.figure import Figure
from PIL import Image as PillowImage

from emd_retrieval.reports.match import Float, Image, MatchPicture, box_areas, lit_by_weights

_ROW = 2.5  # inches


# Dollar signs in the name of a class or file are no formula.
@matplotlib.rc_context({"text.parse_math": False})
def rebuilt_figure(matches: Sequence[MatchPicture]) -> Figure:
    """Draw each query, the query rebuilt from parts of the reference, and the reference.

    As in Figure 6 of the paper: in the place of each part of the query stands the part of the
    reference to which most of its mass flows, and node weights are light.

    Args:
        matches: One row each.

    Raises:
        ValueError: If there are no matches.
    """
    if not matches:
        raise ValueError("matches: expected at least one, got none")
    height = _ROW * len(matches)
    figure = Figure(figsize=(6.8, height), dpi=150)
    grid = figure.subplots(
        len(matches), 3, squeeze=False,
        gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.02, "top": 1 - 0.42 / height,
                     "wspace": 0.04, "hspace": 0.2},
    )  # fmt: skip
    for row, match in zip(grid, matches, strict=True):
        rebuilt = lit_by_weights(rebuild(match), match.boxes, match.query_weights)
        # The long line above the left picture has the whole width to itself.
        about = f"{match.title}, similarity {match.similarity:.3f}"
        titles = f"{about}\nquery", "rebuilt from the reference", "reference"
        pictures = match.query, rebuilt, match.reference
        for axes, picture, title in zip(row, pictures, titles, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
            axes.set_title(title, fontsize=7.5, loc="left", pad=3)
    return figure


def rebuild(match: MatchPicture) -> Image:
    """The query made of the reference's parts; black where the query has no part.

    Small parts are laid over large ones. A node of the whole image says nothing about parts, and
    is used only where a side has no other.

    Args:
        match: Boxes, flow and the reference's pixels.

    Returns:
        Pixels. Shape: that of ``match.query``.
    """
    others = match.boxes if match.reference_boxes is None else match.reference_boxes
    height, width = match.query.shape[:2]
    rebuilt = np.zeros((height, width, 3), np.uint8)
    targets = _parts(others)
    nodes = _parts(match.boxes)
    for node in nodes[np.argsort(-box_areas(match.boxes[nodes]), kind="stable")]:
        flow = match.flow[node, targets]
        if not flow.max() > 0:
            continue
        patch = _crop(match.reference, others[targets[int(flow.argmax())]])
        x0, y0, x1, y1 = _pixels(match.boxes[node], width, height)
        if x1 > x0 and y1 > y0:
            resized = PillowImage.fromarray(patch).resize((x1 - x0, y1 - y0))
            rebuilt[y0:y1, x0:x1] = np.asarray(resized)
    return rebuilt


def _parts(boxes: Float) -> np.ndarray:
    """Nodes that are not the whole image; all where there are no others."""
    whole = box_areas(boxes) > 0.99
    return np.arange(len(boxes)) if whole.all() else np.flatnonzero(~whole)


def _crop(image: Image, box: Float) -> Image:
    height, width = image.shape[:2]
    x0, y0, x1, y1 = _pixels(box, width, height)
    return image[min(y0, height - 1) : max(y1, y0 + 1), min(x0, width - 1) : max(x1, x0 + 1)]


def _pixels(box: Float, width: int, height: int) -> tuple[int, int, int, int]:
    """A box in whole pixels, inside the image."""
    x0, y0, x1, y1 = np.rint(box * np.array([width, height, width, height])).astype(int).tolist()
    return max(0, x0), max(0, y0), min(width, x1), min(height, y1)
