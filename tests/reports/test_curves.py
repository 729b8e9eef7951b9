from itertools import pairwise

import pandas as pd
import pytest
from PIL import Image

from emd_retrieval.reports import save_figure, shortlist_figure

CURVE = pd.DataFrame(
    {
        "shortlist": [10, 20, 50, 100, 200, 500, 1000, 1486],
        "P@1": [73.0, 73.6, 74.1, 74.3, 74.4, 74.4, 74.4, 74.4],
        "RP": [47.1, 47.5, 47.9, 48.0, 48.0, 48.0, 48.0, 48.0],
        "MAP@R": [36.4, 36.8, 37.1, 37.3, 37.3, 37.3, 37.3, 37.3],
        "ms a query": [0.4, 0.6, 1.1, 2.0, 4.1, 10.0, 20.0, 30.0],
    }
)
RAW = {"P@1": 72.6, "RP": 48.0, "MAP@R": 37.2}


@pytest.mark.parametrize("rows", [8, 1])
def test_lines_are_the_table_over_raw(rows, tmp_path):
    curve = CURVE.head(rows)
    figure = shortlist_figure(curve, RAW)
    quality, latency = figure.axes
    solid = {line.get_label(): line for line in quality.lines if line.get_linestyle() == "-"}
    assert set(solid) == {"P@1 (Raw 72.6)", "RP (Raw 48.0)", "MAP@R (Raw 37.2)"}
    for name, line in solid.items():
        metric = name.split()[0]
        assert line.get_xdata().tolist() == curve["shortlist"].tolist()
        assert line.get_ydata() + RAW[metric] == pytest.approx(curve[metric].to_numpy())
    dashed = [line for line in quality.lines if line.get_linestyle() == "--"]
    assert [set(line.get_ydata()) for line in dashed] == [{0}], "Raw itself"
    assert latency.lines[0].get_ydata().tolist() == curve["ms a query"].tolist()
    assert latency.get_ylim()[0] == 0
    with Image.open(save_figure(figure, tmp_path / "shortlist.png")) as image:
        assert image.size == (1360, 460)


def test_axes_say_what_they_are():
    quality, latency = shortlist_figure(CURVE, RAW).axes
    assert quality.get_ylabel() == "gain over Raw (percent points)"
    assert "ms" in latency.get_ylabel()
    for axes in (quality, latency):
        assert axes.get_xscale() == "log"
        assert "shortlist size" in axes.get_xlabel()


def test_without_raw_the_metrics_are_drawn():
    quality, _ = shortlist_figure(CURVE).axes
    assert [line.get_linestyle() for line in quality.lines] == ["-"] * 3
    assert [line.get_ydata().tolist() for line in quality.lines] == [
        CURVE[name].tolist() for name in ("P@1", "RP", "MAP@R")
    ]
    assert quality.get_ylabel() == "percent"


@pytest.mark.parametrize("last", [1001, 1486, 5923, 60501])
def test_labels_of_sizes_do_not_overlap(last):
    """A full shortlist may be just above the last round one, or far from it."""
    curve = CURVE.assign(shortlist=[10, 20, 50, 100, 200, 500, 1000, last])
    figure = shortlist_figure(curve, RAW)
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        assert len(labels) >= 4
        assert str(last) in {label.get_text() for label in labels}
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
        for left, right in pairwise(boxes):
            assert left.x1 < right.x0


def test_a_missing_column_is_named():
    with pytest.raises(
        ValueError, match=r"^curve: expected columns \['MAP@R'\], got \['shortlist'"
    ):
        shortlist_figure(CURVE.drop(columns="MAP@R"))
