import io

import numpy as np
import pytest
from matplotlib.patches import ConnectionPatch
from support_matches import small_match

from emd_retrieval.reports.flows import flows_figure


def lines(figure):
    return [artist for artist in figure.get_children() if isinstance(artist, ConnectionPatch)]


def test_every_flow_is_a_line_and_the_largest_is_widest():
    match = small_match()
    figure = flows_figure([match])
    drawn = lines(figure)
    assert len(drawn) == 3
    widths = [line.get_linewidth() for line in drawn]
    assert widths == sorted(widths)
    assert widths[-1] > widths[0]
    # The middles of the halves: mass flows from the right half to the left one.
    assert drawn[-1].xy1 == pytest.approx((30, 15))
    assert drawn[-1].xy2 == pytest.approx((10, 15))
    figure.savefig(io.BytesIO())


def test_costs_are_told_by_colour():
    drawn = lines(flows_figure([small_match()]))
    colours = np.array([line.get_edgecolor()[:3] for line in drawn])
    order = np.argsort([0.8, 0.1, 0.4])  # costs of the flows, the smallest flow first
    brightness = colours.sum(axis=1)[order]
    assert (np.diff(brightness) > 0).all()


def test_small_flows_are_left_out():
    assert len(lines(flows_figure([small_match()], least=0.2))) == 2
    assert len(lines(flows_figure([small_match()], least=0.9))) == 0


def test_rows_and_none():
    assert len(lines(flows_figure([small_match()] * 2))) == 6
    with pytest.raises(ValueError, match="got none"):
        flows_figure([])
