"""How runs went: the loss, and validation on held-out classes, over steps."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from emd_retrieval.reports.style import CHART, COLORS, PAGE, line_style, panels
from emd_retrieval.reports.table8 import LOSS_NAMES, METHOD_NAMES

_SMOOTHED_OVER = 20
_MANY = 25  # points; beyond, markers touch


@rc_context(CHART)
def training_figure(
    losses: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    metric: str = "MAP@R",
    best_step: int | None = None,
    width: float = PAGE,
) -> Figure:
    """The loss of each step, and validation with the step that was kept.

    Args:
        losses: Columns ``step`` and ``loss``.
        validation: Columns ``step`` and the metric, in percent, and optionally ``interval``, half
            the width of its 95 % interval; without rows the loss is all.
        metric: What decided.
        best_step: Whose weights were kept.
        width: In inches; the panels of a narrow figure lie below each other.
    """
    figure, axes = panels(2 if len(validation) else 1, width, 2.1)
    left = axes[0]
    left.plot(losses["step"], losses["loss"], color=COLORS[4], linewidth=0.6, alpha=0.7)
    window = min(_SMOOTHED_OVER, max(1, len(losses) // 4))
    smooth = losses["loss"].rolling(window, center=True, min_periods=1).mean()
    left.plot(losses["step"], smooth, color=COLORS[0])
    left.set(xlabel="step", ylabel="training loss")
    if len(validation):
        right = axes[1]
        marker = "o" if len(validation) <= _MANY else ""
        right.plot(validation["step"], validation[metric], color=COLORS[2], marker=marker)
        if "interval" in validation:
            low, high = (validation[metric] + sign * validation["interval"] for sign in (-1, 1))
            right.fill_between(validation["step"], low, high, color=COLORS[2], alpha=0.18, lw=0)
        if best_step is not None:
            right.axvline(best_step, color=COLORS[5], linestyle="--", linewidth=0.9)
            right.annotate(f"kept: {best_step}", (best_step, 0.03), color=COLORS[5], fontsize=6.5,
                           xycoords=("data", "axes fraction"), xytext=(3, 0),
                           textcoords="offset points")  # fmt: skip
        name = "accuracy" if metric == "validation" else metric
        right.set(xlabel="step", ylabel=f"{name}, held-out classes (%)")
    return figure


@rc_context(CHART)
def cells_training_figure(
    curves: pd.DataFrame, *, metric: str = "MAP@R", width: float = PAGE
) -> Figure:
    """Validation over steps of many runs: a panel a loss, a colour a method, a line a seed.

    Args:
        curves: Columns ``loss``, ``method``, ``seed``, ``step`` and the metric, in percent.
        metric: What is drawn.
        width: In inches.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not len(curves):
        raise ValueError("curves: expected at least one run with validation, got none")
    losses, methods = (list(dict.fromkeys(curves[name])) for name in ("loss", "method"))
    figure, axes = panels(len(losses), width, 1.9, most=3, sharey=True)
    for loss, panel in zip(losses, axes, strict=True):
        for (method, _), part in curves[curves["loss"] == loss].groupby(
            ["method", "seed"], sort=False
        ):
            style = line_style(methods.index(method)) | {"marker": ""}
            panel.plot(part["step"], part[metric], linewidth=1.0, alpha=0.85, **style)
        panel.set_title(LOSS_NAMES.get(loss, loss), loc="left")
        panel.set(xlabel="step")
    axes[0].set_ylabel(f"{metric}, held-out (%)")
    handles = [
        axes[0].plot([], [], color=COLORS[number % len(COLORS)])[0]
        for number in range(len(methods))
    ]
    figure.legend(handles, [METHOD_NAMES.get(method, method) for method in methods],
                  loc="outside upper center", ncols=4)  # fmt: skip
    return figure
