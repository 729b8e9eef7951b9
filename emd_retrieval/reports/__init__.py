"""What people look at: figures of results. Nothing here computes a result."""

from emd_retrieval.reports.curves import shortlist_figure
from emd_retrieval.reports.files import save_figure
from emd_retrieval.reports.flows import flows_figure
from emd_retrieval.reports.gallery import GalleryRow, Neighbour, gallery_figure, short_label
from emd_retrieval.reports.match import MatchPicture, match_figure
from emd_retrieval.reports.rebuilt import rebuilt_figure

__all__ = [
    "GalleryRow",
    "MatchPicture",
    "Neighbour",
    "flows_figure",
    "gallery_figure",
    "match_figure",
    "rebuilt_figure",
    "save_figure",
    "short_label",
    "shortlist_figure",
]
