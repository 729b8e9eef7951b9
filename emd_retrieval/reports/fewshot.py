"""The few-shot tables for people: ours beside the paper's, and the k-shot curve of Figure 5.

Numbers come in computed; the paper's (Tables 1-5 and 7) are in ``paper_fewshot.csv``, transcribed.
Intervals that cannot be read in the source are left out.
"""

from __future__ import annotations

from importlib import resources

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from emd_retrieval.reports.style import (
    CHART,
    PAGE,
    is_narrow,
    legend_above,
    line_style,
    panels,
)


def paper_fewshot(table: int) -> pd.DataFrame:
    """A table of the paper: ``row``, ``data``, ``way``, ``shot``, ``accuracy``, ``interval``.

    Example:
        >>> numbers = paper_fewshot(1).set_index(["row", "way"])["accuracy"]
        >>> float(numbers["DeepEMD-FCN", 5])
        65.91
    """
    file = resources.files("emd_retrieval.reports") / "paper_fewshot.csv"
    with file.open(encoding="utf-8") as lines:
        whole = pd.read_csv(lines)
    if table not in set(whole["table"]):
        known = ", ".join(str(number) for number in sorted(set(whole["table"])))
        raise ValueError(f"table: expected one of {known}, got {table}")
    part = whole[whole["table"] == table]
    return part.drop(columns="table").reset_index(drop=True)


def fewshot_layout(cells: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row a method, as in the paper, with two columns for each way and shot.

    Args:
        cells: ``row``, ``way``, ``shot``, ``accuracy`` and ``interval``, in percent; and perhaps
            ``mean clusters``, of an image.
        paper: The same columns; rows that only the paper has come after ours.

    Returns:
        Text.
    """
    settings = list(dict.fromkeys(zip(cells["way"], cells["shot"], strict=True)))
    settings += [
        pair for pair in dict.fromkeys(zip(paper["way"], paper["shot"], strict=True))
        if pair not in settings
    ]  # fmt: skip
    ours, theirs = _by_cell(cells), _by_cell(paper)
    clusters = {}
    if "mean clusters" in cells:
        counted = cells.dropna(subset="mean clusters")
        clusters = dict(zip(counted["row"], counted["mean clusters"], strict=True))
    rows = []
    for name in dict.fromkeys([*cells["row"], *paper["row"]]):
        row = {"method": name}
        if clusters:
            row["mean clusters"] = f"{clusters[name]:.1f}" if name in clusters else ""
        for way, shot in settings:
            row[f"{way}-way {shot}-shot"] = ours.get((name, way, shot), "")
            row[f"paper's {way}-way {shot}-shot"] = theirs.get((name, way, shot), "")
        rows.append(row)
    return pd.DataFrame(rows)


@rc_context(CHART)
def shots_figure(cells: pd.DataFrame, *, width: float = PAGE) -> Figure:
    """Accuracy against the number of support images, a line a classifier (Figure 5).

    Args:
        cells: ``row``, ``shot``, ``accuracy`` and ``interval``, in percent.
        width: In inches.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not len(cells):
        raise ValueError("cells: expected at least one, got none")
    figure, (axes,) = panels(1, width, 2.8)
    for number, (name, part) in enumerate(cells.groupby("row", sort=False)):
        axes.errorbar(
            part["shot"], part["accuracy"], yerr=part["interval"], label=str(name),
            elinewidth=0.9, **line_style(number),
        )  # fmt: skip
    axes.set(xlabel="support images a class", ylabel="accuracy (percent)")
    axes.set_xticks(sorted(set(cells["shot"])))
    legend_above(axes, 2 if is_narrow(width) else 4)
    return figure


def _by_cell(table: pd.DataFrame) -> dict[tuple[str, int, int], str]:
    return {
        (str(entry["row"]), int(entry["way"]), int(entry["shot"])): _number(
            entry["accuracy"], entry["interval"]
        )
        for _, entry in table.iterrows()
    }


def _number(value: float, interval: float) -> str:
    return f"{value:.2f}" if pd.isna(interval) else f"{value:.2f} ± {interval:.2f}"
