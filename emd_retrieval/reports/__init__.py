"""What people look at: figures of results. Nothing here computes a result.

Every figure is a call that returns a :class:`matplotlib.figure.Figure`; charts take a width in
inches, of which ``COLUMN`` and ``PAGE`` are a paper's.
"""

from emd_retrieval.reports.answers import answer_figure
from emd_retrieval.reports.charts import Chart, record_charts
from emd_retrieval.reports.curves import shortlist_figure
from emd_retrieval.reports.fewshot import shots_figure
from emd_retrieval.reports.files import save_figure
from emd_retrieval.reports.flows import flows_figure
from emd_retrieval.reports.gallery import GalleryRow, Neighbour, gallery_figure, short_label
from emd_retrieval.reports.match import MatchPicture, match_figure
from emd_retrieval.reports.rebuilt import rebuilt_figure
from emd_retrieval.reports.solvers import solvers_figure
from emd_retrieval.reports.style import COLUMN, PAGE
from emd_retrieval.reports.table8 import table8_figure
from emd_retrieval.reports.tradeoff import tradeoff_figure
from emd_retrieval.reports.training import cells_training_figure, training_figure

__all__ = [
    "COLUMN",
    "PAGE",
    "Chart",
    "GalleryRow",
    "MatchPicture",
    "Neighbour",
    "answer_figure",
    "cells_training_figure",
    "flows_figure",
    "gallery_figure",
    "match_figure",
    "rebuilt_figure",
    "record_charts",
    "save_figure",
    "short_label",
    "shortlist_figure",
    "shots_figure",
    "solvers_figure",
    "table8_figure",
    "tradeoff_figure",
    "training_figure",
]
