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
def test_lines_are_the_table(rows, tmp_path):
    curve = CURVE.head(rows)
    figure = shortlist_figure(curve, RAW)
    quality, latency = figure.axes
    solid = {line.get_label(): line for line in quality.lines if line.get_linestyle() == "-"}
    assert set(solid) == {"P@1", "RP", "MAP@R"}
    for name, line in solid.items():
        assert line.get_xdata().tolist() == curve["shortlist"].tolist()
        assert line.get_ydata().tolist() == curve[name].tolist()
    dashed = [
        line for line in quality.lines if line.get_linestyle() == "--" and len(line.get_ydata())
    ]
    assert sorted(line.get_ydata()[0] for line in dashed) == sorted(RAW.values())
    assert latency.lines[0].get_ydata().tolist() == curve["ms a query"].tolist()
    assert latency.get_ylim()[0] == 0
    with Image.open(save_figure(figure, tmp_path / "shortlist.png")) as image:
        assert image.size == (1080, 435)


def test_axes_say_what_they_are():
    figure = shortlist_figure(CURVE, RAW)
    quality, latency = figure.axes
    assert quality.get_ylabel() == "percent"
    assert "ms" in latency.get_ylabel()
    told = [text.get_text() for text in quality.get_legend().get_texts()]
    assert told == ["P@1", "RP", "MAP@R", "Raw"]
    for axes in (quality, latency):
        assert axes.get_xscale() == "log"
        assert "shortlist size" in axes.get_xlabel()


def test_without_raw_nothing_is_dashed():
    quality, _ = shortlist_figure(CURVE).axes
    assert [line.get_linestyle() for line in quality.lines] == ["-"] * 3
    assert "Raw" not in [text.get_text() for text in quality.get_legend().get_texts()]


@pytest.mark.parametrize("last", [1001, 1486, 5923, 60501])
def test_labels_of_sizes_do_not_overlap(last):
    """A full shortlist may be just above the last round one, or far from it."""
    curve = CURVE.assign(shortlist=[10, 20, 50, 100, 200, 500, 1000, last])
    figure = shortlist_figure(curve, RAW)
    figure.canvas.draw()
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
