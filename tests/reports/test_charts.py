import pandas as pd
import pytest

from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import (
    COLUMN,
    PAGE,
    cells_training_figure,
    record_charts,
    shots_figure,
    solvers_figure,
)

TIMES = pd.DataFrame(
    [
        {"size": size, "solver": solver, "us, 1 thread": us, "us, 2 threads": us / 2}
        for solver, factor in (("opencv", 20), ("simplex x86-64-v4", 1), ("simplex x86-64-v2", 2))
        for size, us in (("25x25", 3.0 * factor), ("9x9", 1.0 * factor), ("14x25", 2.0 * factor))
    ]
)
CURVE = pd.DataFrame(
    {"shortlist": [10, 100], "P@1": 70.0, "RP": 40.0, "MAP@R": 30.0, "ms a query": [1.0, 5.0]}
)


def record(tables, **settings):
    return ResultRecord("run", "A run", tables, settings, {}, 0)


def names(record):
    return [chart.name for chart in record_charts(record)]


def test_a_record_gives_the_charts_of_its_tables():
    assert names(record({"time": TIMES})) == ["solvers"]
    metrics = pd.DataFrame({"method": ["Raw"] * 3, "metric": ["P@1", "RP", "MAP@R"], "value": 1.0})
    charts = record_charts(record({"metrics": metrics, "shortlist": CURVE}))
    assert [chart.name for chart in charts] == ["shortlist"]
    labels = [line.get_label() for line in charts[0].draw(PAGE).axes[0].lines]
    assert "P@1 (Raw 1.0)" in labels
    shots = pd.DataFrame({"row": "NN", "shot": [1, 5], "accuracy": 50.0, "interval": 1.0})
    assert names(record({"cells": shots})) == [], "two points are no curve"
    tuned = pd.DataFrame({"alpha": [0.0, 1.0], "shortlist": 10, "MAP@R": 3.0, "ms a query": 1.0})
    assert names(record({"settings": tuned})) == [], "what was chosen is not told"
    chosen = {"metric": "MAP@R", "chosen": {"alpha": 1.0, "shortlist": 10}}
    assert names(record({"settings": tuned}, first_stage={"MAP@R": 2.0}, **chosen)) == ["tradeoff"]
    assert names(record({"answers": pd.DataFrame({"id": [1]})})) == []


def test_each_chart_of_a_record_draws_its_own_tables():
    """All charts are drawn after all were found."""
    shots = pd.DataFrame({"row": "NN", "shot": [1, 2, 5], "accuracy": 50.0, "interval": 1.0})
    charts = record_charts(record({"time": TIMES, "cells": shots, "shortlist": CURVE}))
    assert [chart.name for chart in charts] == ["shortlist", "shots", "solvers"]
    figures = {chart.name: chart.draw(COLUMN) for chart in charts}
    labels = {name: figure.axes[0].get_ylabel() for name, figure in figures.items()}
    assert labels == {"shortlist": "percent", "shots": "accuracy (percent)",
                      "solvers": "µs a problem, 1 thread"}  # fmt: skip


def test_solvers_are_lines_by_size():
    axes = solvers_figure(TIMES).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"OpenCV cv2.EMD", "simplex (this package)"}
    assert lines["OpenCV cv2.EMD"].get_xdata().tolist() == [9, 25], "no problem of unequal sides"
    assert lines["OpenCV cv2.EMD"].get_ydata().tolist() == [20, 60]
    assert lines["simplex (this package)"].get_ydata().tolist() == [1, 3], "the widest one"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_solvers_of_no_use_are_refused():
    with pytest.raises(ValueError, match=r"^table: expected columns size, solver and 'us, ...'"):
        solvers_figure(TIMES[["size", "solver"]])
    with pytest.raises(ValueError, match=r"^table: expected sizes as in 25x25, got \['14x25'\]"):
        solvers_figure(TIMES[TIMES["size"] == "14x25"])


@pytest.mark.parametrize("width", [COLUMN, PAGE])
def test_nothing_is_cut_off(width):
    """Legends may be wider than their axes, not than the figure."""
    shots = pd.DataFrame(
        [
            {"row": name, "shot": shot, "accuracy": 50.0, "interval": 1.0}
            for name in ("EMD + NN", "EMD + Fusion", "EMD prototype", "EMD + SFC", "cosine")
            for shot in (1, 5, 10)
        ]
    )
    raw = {"P@1": 72.6, "RP": 48.0, "MAP@R": 37.2}
    metrics = pd.DataFrame({"method": "Raw", "metric": list(raw), "value": list(raw.values())})
    curve = record_charts(record({"metrics": metrics, "shortlist": CURVE}))[0]
    for figure in (solvers_figure(TIMES, width=width), shots_figure(shots, width=width),
                   curve.draw(width)):  # fmt: skip
        figure.draw_without_rendering()
        page = figure.bbox
        for axes in figure.axes:
            texts = [axes.xaxis.label, axes.yaxis.label, *axes.texts]
            legend = axes.get_legend()
            for part in [*texts, *([] if legend is None else [legend])]:
                box = part.get_window_extent()
                assert page.x0 <= box.x0 <= box.x1 <= page.x1
                assert page.y0 <= box.y0 <= box.y1 <= page.y1


def test_a_panel_a_loss_and_a_line_a_run():
    curves = pd.DataFrame(
        [
            {"loss": loss, "method": method, "seed": seed, "step": step, "MAP@R": 30.0 + step}
            for loss in ("arcface", "contrastive")
            for method in ("raw", "fcn")
            for seed in (0, 1)
            for step in (0, 10)
        ]
    )
    figure = cells_training_figure(curves)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["ArcFace", "Contrastive"]
    for axes in figure.axes:
        assert sum(len(line.get_xdata()) == 2 for line in axes.lines) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Raw", "+DeepEMD-F"]
    with pytest.raises(ValueError, match=r"^curves: expected at least one run"):
        cells_training_figure(curves.iloc[:0])


def test_a_width_must_be_one():
    with pytest.raises(ValueError, match=r"^width: expected inches above zero, got 0"):
        solvers_figure(TIMES, width=0)
