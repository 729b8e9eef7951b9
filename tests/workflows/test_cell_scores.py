import numpy as np
import pandas as pd
import pytest

from emd_retrieval.reports.table8 import paper_table8
from emd_retrieval.retrieval import bootstrap_interval
from emd_retrieval.workflows.cell_scores import Cell, bootstrap_means, summarize_cells

METRICS = ["P@1", "RP", "MAP@R"]


def scores(generator, count=40, level=50.0):
    return pd.DataFrame(generator.normal(level, 20, (count, 3)), columns=METRICS)


@pytest.fixture
def cells():
    """Two losses, Raw and FCN in two seeds each, and a control for one of them."""
    generator = np.random.default_rng(0)
    made = {}
    for loss in ("arcface", "contrastive"):
        for method in ("raw", "fcn"):
            for seed in range(2):
                made[Cell(loss=loss, method=method, seed=seed)] = scores(generator)
    for seed in range(2):
        made[Cell(loss="arcface", method="fcn", control="mean", seed=seed)] = scores(generator)
    return made


def row(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_values_and_gains_are_those_of_the_one_column_bootstrap(cells):
    summary = summarize_cells(cells, seed=5, resamples=500)
    pooled = {
        method: (cells[Cell(loss="arcface", method=method)]
                 + cells[Cell(loss="arcface", method=method, seed=1)]) / 2
        for method in ("raw", "fcn")
    }  # fmt: skip
    found = row(summary.cells, loss="arcface", method="fcn", control="", metric="RP")
    value = bootstrap_interval(pooled["fcn"]["RP"].to_numpy(), seed=5, resamples=500)
    assert [found["value"], found["low"], found["high"]] == pytest.approx(
        [value.mean, value.low, value.high]
    )
    paired = (pooled["fcn"]["RP"] - pooled["raw"]["RP"]).to_numpy()
    gain = bootstrap_interval(paired, seed=5, resamples=500)
    assert [found["gain"], found["gain_low"], found["gain_high"]] == pytest.approx(
        [gain.mean, gain.low, gain.high]
    )
    assert found["seeds"] == 2


def test_the_spread_over_seeds_is_apart(cells):
    summary = summarize_cells(cells, resamples=50)
    found = row(summary.cells, loss="contrastive", method="fcn", control="", metric="P@1")
    means = {
        (method, seed): cells[Cell(loss="contrastive", method=method, seed=seed)]["P@1"].mean()
        for method in ("raw", "fcn")
        for seed in range(2)
    }
    values = [means["fcn", seed] for seed in range(2)]
    gains = [means["fcn", seed] - means["raw", seed] for seed in range(2)]
    assert found["spread"] == pytest.approx(np.std(values, ddof=1))
    assert found["gain_spread"] == pytest.approx(np.std(gains, ddof=1))
    one = {cell: frame for cell, frame in cells.items() if cell.seed == 0}
    assert summarize_cells(one, resamples=50).cells["spread"].isna().all(), "one seed has none"


def test_a_control_is_held_against_its_method(cells):
    summary = summarize_cells(cells, seed=3, resamples=300)
    found = row(summary.cells, loss="arcface", control="mean", metric="MAP@R")
    method, control = (
        (cells[Cell(loss="arcface", method="fcn", control=name)]["MAP@R"]
         + cells[Cell(loss="arcface", method="fcn", control=name, seed=1)]["MAP@R"]) / 2
        for name in ("", "mean")
    )  # fmt: skip
    edge = bootstrap_interval((method - control).to_numpy(), seed=3, resamples=300)
    assert [found["edge"], found["edge_low"], found["edge_high"]] == pytest.approx(
        [edge.mean, edge.low, edge.high]
    )
    assert np.isnan(found["paper"]), "the paper has no such row"
    assert summary.cells[summary.cells["control"] == ""]["edge"].isna().all()


def test_mean_gains_over_losses(cells):
    summary = summarize_cells(cells, seed=1, resamples=300)
    found = row(summary.means, method="fcn", control="", metric="P@1")
    gains = [
        row(summary.cells, loss=loss, method="fcn", control="", metric="P@1")["gain"]
        for loss in ("arcface", "contrastive")
    ]
    assert found["gain"] == pytest.approx(np.mean(gains))
    assert found["losses"] == 2
    signs = {"fcn": 0.25, "raw": -0.25}
    differences = sum(
        signs[cell.method] * frame["P@1"] for cell, frame in cells.items() if not cell.control
    )
    interval = bootstrap_interval(differences.to_numpy(), seed=1, resamples=300)
    assert [found["gain_low"], found["gain_high"]] == pytest.approx([interval.low, interval.high])
    paper = paper_table8().set_index(["loss", "method"])["P@1"]
    expected = np.mean(
        [paper[loss, "fcn"] - paper[loss, "raw"] for loss in ("arcface", "contrastive")]
    )
    assert found["paper_gain"] == pytest.approx(expected)


def test_without_raw_there_is_no_gain(cells):
    some = {cell: frame for cell, frame in cells.items() if cell.method != "raw"}
    summary = summarize_cells(some, resamples=20)
    assert summary.cells["gain"].isna().all()
    assert len(summary.means) == 0


def test_other_queries_are_refused(cells):
    cells[Cell(loss="arcface", method="grid")] = next(iter(cells.values())).iloc[:-1]
    with pytest.raises(ValueError) as caught:
        summarize_cells(cells)
    assert str(caught.value) == (
        "scores: arcface/grid/seed0 was scored on 39 queries, arcface/raw/seed0 on 40 or on "
        "others; all cells need the same test images"
    )
    with pytest.raises(ValueError, match=r"^scores: expected at least one cell, got none"):
        summarize_cells({})


def test_resamples_in_parts(monkeypatch):
    values = np.random.default_rng(2).normal(size=(30, 4))
    whole = bootstrap_means(values, seed=4, resamples=25)
    monkeypatch.setattr("emd_retrieval.workflows.cell_scores._DRAWS_AT_ONCE", 100)
    np.testing.assert_allclose(bootstrap_means(values, seed=4, resamples=25), whole, rtol=1e-12)


def test_cells_of_other_seeds_are_not_held_against_each_other(cells):
    cells.pop(Cell(loss="arcface", method="raw", seed=1))
    cells.pop(Cell(loss="arcface", method="fcn", control="mean", seed=1))
    summary = summarize_cells(cells, resamples=50)
    for metric in METRICS:
        found = row(summary.cells, loss="arcface", method="fcn", control="", metric=metric)
        assert found["seeds"] == 2
        assert np.isnan([found["gain"], found["gain_low"], found["gain_spread"]]).all()
        # The control is there in seed 0 alone, as Raw is; the method has both seeds.
        control = row(summary.cells, loss="arcface", method="fcn", control="mean", metric=metric)
        assert np.isfinite(control["gain"])
        assert np.isnan(control["edge"])
        mean = row(summary.means, method="fcn", control="", metric=metric)
        contrastive = row(
            summary.cells, loss="contrastive", method="fcn", control="", metric=metric
        )
        assert mean["losses"] == 1
        assert mean["gain"] == pytest.approx(contrastive["gain"])
