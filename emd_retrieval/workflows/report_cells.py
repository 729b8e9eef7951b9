"""The runs' folder of Table 8 as a report: the table so far, results by class, training curves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pandas as pd

from emd_retrieval.records import ResultRecord
from emd_retrieval.reports.charts import Chart
from emd_retrieval.reports.gallery import short_label
from emd_retrieval.reports.table8 import METHOD_NAMES, controls_layout, table8_layout
from emd_retrieval.reports.training import cells_training_figure
from emd_retrieval.training.monitor import LOG_FILE, read_log
from emd_retrieval.workflows.cell_scores import Cell, summarize_cells
from emd_retrieval.workflows.train import SCORES_FILE

_METRIC = "MAP@R"


def is_cells_folder(folder: Path) -> bool:
    """Whether there are runs of Table 8 in it, finished or not."""
    return any(_cells(folder))


def cells_report(folder: Path) -> tuple[ResultRecord, list[Chart]]:
    """What the runs of a Table 8 measured so far.

    Args:
        folder: ``LOSS/METHOD/seedN/`` with scores and logs.

    Returns:
        The record, and the chart of the training curves where runs were validated.

    Raises:
        ValueError: If no cell has scores, or cells were scored on different images.
    """
    cells = dict(_cells(folder))
    scores = {
        cell: pd.read_parquet(run / SCORES_FILE)
        for cell, run in cells.items()
        if (run / SCORES_FILE).is_file()
    }
    if not scores:
        raise ValueError(f"run: no cell of {folder} has finished (no {SCORES_FILE})")
    summary = summarize_cells(scores)
    tables = {"table8": summary.cells, "mean gains": summary.means}
    controls = controls_layout(summary.cells, summary.means)
    if len(controls):
        tables["controls"] = controls
    classes = _classes(scores)
    if len(classes):
        tables["classes"] = classes
    unfinished = sorted(str(cell) for cell in cells if cell not in scores)
    notes = [
        "Percent. Gains are over Raw of the same loss, paired by query, seeds averaged, with 95 % "
        "bootstrap intervals over queries; ± is the standard deviation over seeds.",
    ]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}.")
    record = ResultRecord(
        name="table8",
        title=f"Table 8 of the runs in {folder.name}",
        tables=tables,
        summary=table8_layout(summary.cells, summary.means),
        settings={"runs": folder.name, "cells": len(scores)},
        data={"queries": len(next(iter(scores.values())))},
        seed=0,
        notes=tuple(notes),
    )
    return record, list(_curves(cells))


def _cells(folder: Path) -> Iterator[tuple[Cell, Path]]:
    """Cells and their folders, losses and methods as the folder has them, seeds in order."""
    for run in sorted(folder.glob("*/*/seed*")):
        number = run.name.removeprefix("seed")
        if not number.isdecimal() or not any(
            (run / name).is_file() for name in (SCORES_FILE, LOG_FILE)
        ):
            continue
        method, _, control = run.parent.name.partition("-")
        if method in METHOD_NAMES:
            yield (
                Cell(loss=run.parts[-3], method=method, control=control, seed=int(number)),
                run,
            )


def _classes(scores: dict[Cell, pd.DataFrame]) -> pd.DataFrame:
    """Mean MAP@R of each class by method, over the losses and seeds that all methods have."""
    plain = {cell: frame[_METRIC] for cell, frame in scores.items() if not cell.control}
    by_method = {
        method: {(cell.loss, cell.seed): values for cell, values in plain.items()
                 if cell.method == method}
        for method in METHOD_NAMES
    }  # fmt: skip
    by_method = {method: found for method, found in by_method.items() if found}
    common = set.intersection(*(set(found) for found in by_method.values())) if by_method else set()
    if not common or len(by_method) < 2:
        return pd.DataFrame()
    per_query = pd.DataFrame(
        {
            METHOD_NAMES[method]: pd.concat([found[key] for key in common], axis=1).mean(axis=1)
            for method, found in by_method.items()
        }
    )
    folders = [PurePosixPath(str(name)).parent.name for name in per_query.index]
    if not all(folders):
        return pd.DataFrame()  # names without folders do not tell classes
    grouped = per_query.assign(**{"class": [short_label(name, 48) for name in folders]})
    table = grouped.groupby("class").mean()
    table.insert(0, "queries", grouped.groupby("class").size())
    first, *others = (METHOD_NAMES[method] for method in by_method)
    if first == METHOD_NAMES["raw"]:
        for name in others:
            table[f"gain of {name}"] = table[name] - table[first]
        table = table.sort_values(f"gain of {others[0]}", ascending=False)
    return table.reset_index()


def _curves(cells: dict[Cell, Path]) -> Iterator[Chart]:
    parts = []
    for cell, run in cells.items():
        log = pd.DataFrame(read_log(run)).apply(pd.to_numeric, errors="coerce")
        if cell.control or _METRIC not in log:
            continue
        validated = log.dropna(subset=[_METRIC])[["step", _METRIC]]
        parts.append(validated.assign(loss=cell.loss, method=cell.method, seed=cell.seed))
    curves = pd.concat(parts) if parts else pd.DataFrame()
    if len(curves):
        yield Chart(
            "training",
            "Training",
            "Validation on held-out classes over steps, a panel a loss, a line a seed.",
            lambda width: cells_training_figure(curves, width=width),
        )
