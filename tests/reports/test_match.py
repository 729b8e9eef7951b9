import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from emd_retrieval.reports import MatchPicture, match_figure, save_figure
from emd_retrieval.reports.match import largest_flows

# A 2x2 level and the whole image, as in the pyramid (2, 1).
BOXES = np.array(
    [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1], [0, 0, 1, 1]]
)


def match(flow=None, title="robin", size=(40, 60)):
    flow = np.full((5, 5), 0.04) if flow is None else flow
    image = np.full((*size, 3), 200, dtype=np.uint8)
    return MatchPicture(
        query=image, reference=image, boxes=BOXES, query_weights=flow.sum(1),
        reference_weights=flow.sum(0), flow=flow, cost=np.full((5, 5), 0.25), similarity=0.75,
        title=title,
    )  # fmt: skip


def texts(figure):
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_largest_flows_between_parts():
    flow = np.zeros((5, 5))
    flow[4, 4] = 0.5  # the whole image is no part
    flow[0, 1] = 0.2
    flow[0, 2] = 0.15  # its query part is drawn already
    flow[3, 3] = 0.1
    flow[2, 1] = 0.05  # its reference part is drawn already
    assert largest_flows(flow, BOXES, 4) == [(0, 1), (3, 3)]
    assert largest_flows(flow, BOXES, 1) == [(0, 1)]
    assert largest_flows(np.zeros((5, 5)), BOXES, 4) == []


def test_overlapping_parts_of_two_levels_are_drawn_once():
    boxes = np.array([[0, 0, 0.5, 0.5], [0, 0, 1 / 3, 1 / 3], [2 / 3, 2 / 3, 1, 1]])
    flow = np.diag([0.5, 0.3, 0.2])
    assert largest_flows(flow, boxes, 3) == [(0, 0), (2, 2)]


def test_parts_that_overlap_a_little_are_drawn():
    boxes = np.array([[0, 0, 0.6, 0.6], [0.4, 0.4, 1, 1]])
    assert largest_flows(np.diag([0.6, 0.4]), boxes, 2) == [(0, 0), (1, 1)]


def test_each_side_has_its_own_boxes():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5]])
    others = np.array([[0, 0, 1, 1], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]])
    flow = np.array([[0.3, 0.1, 0.1], [0.2, 0.05, 0.25]])
    assert largest_flows(flow, boxes, 4, others) == [(1, 2), (0, 1)]
    image = np.full((40, 40, 3), 200, dtype=np.uint8)
    picture = MatchPicture(
        query=image, reference=image, boxes=boxes, reference_boxes=others,
        query_weights=flow.sum(1), reference_weights=flow.sum(0), flow=flow,
        cost=np.zeros((2, 3)), similarity=1.0, title="robin",
    )  # fmt: skip
    _, right, _ = match_figure([picture]).axes
    frame = right.patches[0].get_bbox()
    assert (frame.x0, frame.y0) == pytest.approx((20.48, 20.48))


def test_pairs_are_framed_numbered_and_told():
    flow = np.diag([0.4, 0.3, 0.2, 0.05, 0.05])
    figure = match_figure([match(flow)], pairs=3)
    left, right, _ = figure.axes
    assert len(left.patches) == len(right.patches) == 3
    assert [text.get_text() for text in left.texts] == ["1", "2", "3"]
    assert len(figure.artists) == 3, "one line a pair"
    shown = texts(figure)
    assert "similarity 0.750" in shown
    assert "1   40 % of the mass, cost 0.25" in shown
    assert "3   20 % of the mass, cost 0.25" in shown
    # The upper left part of a 60 x 40 image, a little inside its edge.
    frame = left.patches[0].get_bbox()
    assert (frame.x0, frame.y0) == pytest.approx((0.72, 0.72))
    assert (frame.x1, frame.y1) == pytest.approx((29.28, 19.28))


def test_heavier_nodes_are_lighter():
    flow = np.diag([0.7, 0.1, 0.1, 0.1, 0.0])
    figure = match_figure([match(flow)])
    shown = figure.axes[0].images[0].get_array()
    assert shown[5, 5].min() > shown[5, 50].max()
    assert shown[5, 50].tolist() == shown[35, 5].tolist()


def test_files_and_names(tmp_path):
    matches = [match(title="cost $5 or $6_{"), match(title="x" * 200)]
    figure = match_figure(matches)
    for text in figure.findobj(Text):
        assert not (text.get_text() and text.get_parse_math())
    with Image.open(save_figure(figure, tmp_path / "matches.png")) as image:
        assert image.size == (1020, int(2 * 2.75 * 150))
    save_figure(figure, tmp_path / "matches.svg")
    assert (tmp_path / "matches.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_refuses_nothing_to_draw():
    with pytest.raises(ValueError, match="matches: expected at least one, got none"):
        match_figure([])
