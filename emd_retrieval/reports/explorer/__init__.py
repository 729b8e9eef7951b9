"""The report page: one HTML file with a run's tables, figures and the explorer of its matches."""

from emd_retrieval.reports.explorer.data import ClassResult, ExplorerData, Match, Picture, Query
from emd_retrieval.reports.explorer.page import PageFigure, render_page

__all__ = ["ClassResult", "ExplorerData", "Match", "PageFigure", "Picture", "Query", "render_page"]
