import pandas as pd
import pytest

from emd_retrieval.reports.table8 import (
    METRICS,
    controls_layout,
    paper_table8,
    table8_figure,
    table8_latex,
    table8_layout,
)

NAN = float("nan")


def cell(loss, method, metric, value, gain=NAN, control="", edge=NAN, paper=NAN, paper_gain=NAN):
    return {
        "loss": loss, "method": method, "control": control, "metric": metric, "seeds": 3,
        "value": value, "low": value - 2, "high": value + 2, "spread": 0.25,
        "gain": gain, "gain_low": gain - 1, "gain_high": gain + 1, "gain_spread": 0.1,
        "edge": edge, "edge_low": edge - 1, "edge_high": edge + 1,
        "paper": paper, "paper_gain": paper_gain,
    }  # fmt: skip


@pytest.fixture
def tables():
    rows = [cell("arcface", "raw", m, 70.0, paper=62.74) for m in METRICS]
    rows += [cell("arcface", "fcn", m, 71.5, 1.5, paper=63.92, paper_gain=1.18) for m in METRICS]
    rows += [cell("arcface", "fcn", m, 70.5, 0.5, control="mean", edge=1.0) for m in METRICS]
    cells = pd.DataFrame(rows)
    means = cells[cells["gain"].notna()].drop(columns=["loss", "value", "paper"])
    return cells, means.assign(losses=1)


def test_the_papers_numbers():
    table = paper_table8().set_index(["loss", "method"])
    assert len(table) == 24
    gains = {
        method: (table.xs(method, level=1) - table.xs("raw", level=1)).mean().round(2).tolist()
        for method in ("fcn", "grid", "sampling")
    }
    # As computed from the paper's printed values by hand.
    assert gains["fcn"] == [1.68, 1.28, 1.34]
    assert gains["grid"] == pytest.approx([3.05, 1.84, 1.94], abs=0.011)
    assert gains["sampling"] == [4.14, 3.03, 3.05]
    arcface = table.loc[("arcface", "fcn"), "P@1"] - table.loc[("arcface", "raw"), "P@1"]
    assert arcface == pytest.approx(1.18), "the paper prints 1.45"


def test_layout(tables):
    layout = table8_layout(*tables)
    assert layout["loss"].tolist() == ["ArcFace", "ArcFace", "mean of 1"]
    assert layout["method"].tolist() == ["Raw", "+DeepEMD-F", "+DeepEMD-F"]
    raw, fcn, mean = (layout.iloc[i] for i in range(3))
    assert raw["P@1"] == "70.00 ± 0.25"
    assert raw["gain in P@1"] == ""
    assert raw["paper's P@1"] == "62.74"
    assert fcn["gain in MAP@R"] == "+1.50 [+0.50, +2.50]"
    assert fcn["paper's RP"] == "63.92 (+1.18)"
    assert mean["paper's RP"] == "+1.18"


def test_one_seed_has_no_spread(tables):
    cells, means = tables
    layout = table8_layout(cells.assign(spread=NAN), means)
    assert layout["P@1"].tolist() == ["70.00", "71.50", ""]


def test_controls(tables):
    layout = controls_layout(*tables)
    assert layout["loss"].tolist() == ["mean of 1", "ArcFace"]
    assert set(layout["instead"]) == {"mean of the nodes, cosine"}
    assert layout["its gain in P@1"].tolist() == ["+0.50 [-0.50, +1.50]"] * 2
    assert layout["the method's over it, RP"].tolist() == ["+1.00 [+0.00, +2.00]"] * 2


def test_latex(tables):
    text = table8_latex(*tables)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {row.count(" & ") for row in rows} == {7}
    assert r"\multirow{2}{*}{ArcFace} & Raw & 70.00 & \textcolor{gray}{62.74}" in rows[1]
    assert r"71.50 $+1.50$ {\scriptsize$[+0.50, +2.50]$} & \textcolor{gray}{63.92 $+1.18$}" in text
    assert rows[3].startswith("Mean gain & +DeepEMD-F & $+1.50$ ")
    assert text.count("{") == text.count("}")
    assert "mean of the nodes" not in text, "controls have a table of their own"


def test_figure(tables):
    figure = table8_figure(*tables)
    panels = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == list(METRICS)
    drawn = {tuple(map(float, line.get_xdata())) for line in panels[0].lines}
    assert {(1.5,), (0.5, 2.5), (1.18,)} <= drawn
    assert (0.5,) not in drawn, "no control in the chart"
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["ArcFace", "mean"]


def test_a_chart_of_nothing(tables):
    cells, means = tables
    with pytest.raises(ValueError, match=r"^cells: expected a method with a gain over Raw"):
        table8_figure(cells[cells["method"] == "raw"], means.iloc[:0])
