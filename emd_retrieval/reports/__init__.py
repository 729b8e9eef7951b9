"""What people look at: figures of results. Nothing here computes a result."""

from emd_retrieval.reports.curves import shortlist_figure
from emd_retrieval.reports.gallery import GalleryRow, Neighbour, gallery_figure

__all__ = ["GalleryRow", "Neighbour", "gallery_figure", "shortlist_figure"]
