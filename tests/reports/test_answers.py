"""The figures of search and tune."""

import numpy as np
import pandas as pd
import pytest

from emd_retrieval.reports import save_figure
from emd_retrieval.reports.answers import answer_figure
from emd_retrieval.reports.tradeoff import tradeoff_figure

PICTURE = np.full((20, 30, 3), 90, np.uint8)


def test_answers_are_drawn_with_rank_similarity_and_name(tmp_path):
    names = [f"a/{i}_$x$.jpg" for i in range(7)]
    figure = answer_figure(PICTURE, [PICTURE] * 6 + [None], names, [1 - i / 10 for i in range(7)])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["query", *(f"{i + 1}   {1 - i / 10:.3f}" for i in range(7))]
    assert [axes.get_xlabel() for axes in figure.axes[1:]] == names
    assert not figure.axes[-1].images
    assert save_figure(figure, tmp_path / "answer.png").stat().st_size > 1000


def test_answers_must_fit_each_other():
    with pytest.raises(ValueError, match=r"got 1, 2 and 1"):
        answer_figure(PICTURE, [PICTURE], ["a", "b"], [1.0])
    with pytest.raises(ValueError, match=r"got 0, 0 and 0"):
        answer_figure(PICTURE, [], [], [])


def test_the_tradeoff_has_a_line_a_size_and_a_ring(tmp_path):
    table = pd.DataFrame(
        {
            "alpha": [0.0, 1.0] * 2,
            "shortlist": [10, 10, 50, 50],
            "MAP@R": [30.0, 35.0, 31.0, 38.0],
            "ms a query": [1.0, 1.0, 2.5, 2.5],
        }
    )
    figure = tradeoff_figure(table, "MAP@R", 30.0, (1.0, 50))
    mixing, cost = figure.axes
    lines = [line for line in mixing.lines if line.get_label() in ("10 (1)", "50 (1)")]
    assert [list(line.get_ydata()) for line in lines] == [[30.0, 35.0], [31.0, 38.0]]
    assert mixing.collections[0].get_offsets().tolist() == [[1.0, 38.0]]
    assert cost.collections[0].get_offsets().tolist() == [[2.5, 38.0]]
    assert save_figure(figure, tmp_path / "t.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="expected columns"):
        tradeoff_figure(table.drop(columns="alpha"), "MAP@R", 30.0, (1.0, 50))
