"""How a run went: the loss, and validation on held-out classes, over steps."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg", force=False)

import pandas as pd
from matplotlib.figure import Figure

_SMOOTHED_OVER = 20


def training_figure(
    losses: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    metric: str = "MAP@R",
    best_step: int | None = None,
) -> Figure:
    """The loss of each step (left), and validation (right) with the step that was kept.

    Args:
        losses: Columns ``step`` and ``loss``.
        validation: Columns ``step`` and the metric, in percent; without rows the left is all.
        metric: What decided.
        best_step: Whose weights were kept.
    """
    figure = Figure(figsize=(7.2, 2.7), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if len(validation) else 1, squeeze=False)[0]
    left = panels[0]
    left.plot(losses["step"], losses["loss"], color="#56B4E9", linewidth=0.6, alpha=0.7)
    window = min(_SMOOTHED_OVER, max(1, len(losses) // 4))
    smooth = losses["loss"].rolling(window, center=True, min_periods=1).mean()
    left.plot(losses["step"], smooth, color="#0072B2", linewidth=1.4)
    left.set(xlabel="step", ylabel="training loss")
    if len(validation):
        right = panels[1]
        right.plot(validation["step"], validation[metric], color="#009E73", marker="o", ms=3)
        if best_step is not None:
            right.axvline(best_step, color="#D55E00", linestyle="--", linewidth=0.9)
        right.set(xlabel="step", ylabel=f"{metric}, held-out classes")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    return figure
