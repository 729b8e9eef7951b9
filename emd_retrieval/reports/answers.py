"""The answer figure: a query image and what was found, with similarities; no labels needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg", force=False)

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from emd_retrieval.reports.gallery import short_label

Image = NDArray[np.uint8]

_A_ROW = 5


# Dollar signs in the name of a file are no formula.
@matplotlib.rc_context({"text.parse_math": False})
def answer_figure(
    query: Image,
    answers: Sequence[Image | None],
    names: Sequence[str],
    similarities: Sequence[float],
) -> Figure:
    """Draw a query beside its answers, best first.

    Args:
        query: Shape: ``[h, w, 3]``, uint8.
        answers: Pictures of the answers; ``None`` for one that is not at hand.
        names: What the answers are called.
        similarities: Of the answers.

    Raises:
        ValueError: If there are no answers, or not as many of each.
    """
    if not answers or not len(answers) == len(names) == len(similarities):
        raise ValueError(
            f"answers: expected pictures, names and similarities of as many answers, got "
            f"{len(answers)}, {len(names)} and {len(similarities)}"
        )
    rows = math.ceil(len(answers) / _A_ROW)
    columns = min(len(answers), _A_ROW)
    figure = Figure(
        figsize=(1.5 * (columns + 1.4), 1.75 * rows + 0.1), dpi=150, layout="constrained"
    )
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[1.4, *[1.0] * columns])
    axes = figure.add_subplot(grid[:, 0])
    axes.imshow(query)
    axes.set_title("query", fontsize=8, loc="left")
    axes.set_axis_off()
    for place, (answer, name, similarity) in enumerate(
        zip(answers, names, similarities, strict=True)
    ):
        axes = figure.add_subplot(grid[place // _A_ROW, 1 + place % _A_ROW])
        axes.set(xticks=[], yticks=[])
        if answer is not None:
            axes.imshow(answer)
        axes.set_title(f"{place + 1}   {similarity:.3f}", fontsize=7, loc="left", pad=3)
        axes.set_xlabel(short_label(name, 24), fontsize=5.5, labelpad=2)
    return figure
