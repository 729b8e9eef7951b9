import io
from dataclasses import replace

import numpy as np
import pytest
from support_matches import half_boxes, small_match

from emd_retrieval.reports.rebuilt import rebuild, rebuilt_figure


def test_parts_stand_where_their_mass_came_from():
    match = small_match()
    rebuilt = rebuild(match)
    left, right = match.reference[:, :20], match.reference[:, 20:]
    np.testing.assert_array_equal(rebuilt[:, :20], right)
    np.testing.assert_array_equal(rebuilt[:, 20:], left)


def test_small_parts_lie_over_large_ones_and_the_whole_image_is_no_part():
    match = small_match()
    corner, whole = [[0, 0, 0.25, 0.5]], [[0, 0, 1, 1]]
    boxes = np.concatenate([corner, half_boxes(), whole])
    flow = np.zeros((4, 4))
    flow[0, 1] = flow[1, 2] = flow[2, 2] = 0.2
    flow[0, 3] = flow[3, 3] = 0.3
    match = replace(match, boxes=boxes, flow=flow, query_weights=np.full(4, 0.25))
    rebuilt = rebuild(match)
    assert (rebuilt[:15, :10] == match.reference[0, 0]).all(), "the left half, made small"
    assert (rebuilt[15:] == match.reference[0, -1]).all()
    assert (rebuilt[:, 20:] == match.reference[0, -1]).all()


def test_parts_from_which_nothing_flows_stay_black():
    match = small_match()
    flow = match.flow.copy()
    flow[0] = 0
    rebuilt = rebuild(replace(match, flow=flow))
    assert not rebuilt[:, :20].any()
    assert rebuilt[:, 20:].any()


def test_the_figure_shows_three_pictures_a_match():
    match = small_match()
    figure = rebuilt_figure([match, match])
    assert len(figure.axes) == 6
    dark, light = (figure.axes[1].images[0].get_array()[0, x].astype(int) for x in (0, -1))
    plain = rebuild(match)
    np.testing.assert_allclose(light, plain[0, -1], atol=1)
    assert (dark < 0.7 * plain[0, 0]).all(), "the left part weighs a quarter"
    assert "similarity 0.600" in figure.axes[0].get_title(loc="left")
    figure.savefig(io.BytesIO())


def test_names_with_dollars_are_no_formula():
    figure = rebuilt_figure([replace(small_match(), title="a $\\broken b")])
    figure.savefig(io.BytesIO())


def test_no_matches_are_refused():
    with pytest.raises(ValueError, match="got none"):
        rebuilt_figure([])
