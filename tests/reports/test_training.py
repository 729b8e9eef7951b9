import pandas as pd

from emd_retrieval.reports.training import training_figure


def test_loss_and_validation():
    losses = pd.DataFrame({"step": [1, 10, 20], "loss": [2.0, 1.0, 0.5]})
    validation = pd.DataFrame({"step": [0, 10, 20], "MAP@R": [30.0, 35.0, 33.0]})
    left, right = training_figure(losses, validation, best_step=10).axes
    assert left.lines[0].get_ydata().tolist() == [2.0, 1.0, 0.5]
    assert right.lines[0].get_ydata().tolist() == [30.0, 35.0, 33.0]
    assert list(right.lines[1].get_xdata()) == [10, 10], "the step that was kept"


def test_without_validation_there_is_one_panel():
    losses = pd.DataFrame({"step": [1], "loss": [2.0]})
    figure = training_figure(losses, pd.DataFrame({"step": [], "MAP@R": []}))
    assert len(figure.axes) == 1
