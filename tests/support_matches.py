"""A match of two images in halves: mass flows crosswise, a little of it straight."""

from __future__ import annotations

import numpy as np

from emd_retrieval.reports import MatchPicture


def half_boxes():
    return np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])


def small_match() -> MatchPicture:
    reference = np.zeros((30, 40, 3), np.uint8)
    reference[:, :20], reference[:, 20:] = (200, 40, 60), (60, 160, 220)
    return MatchPicture(
        query=np.full((30, 40, 3), 128, np.uint8),
        reference=reference,
        boxes=half_boxes(),
        query_weights=np.array([0.25, 0.75]),
        reference_weights=np.array([0.6, 0.4]),
        flow=np.array([[0.0, 0.25], [0.6, 0.15]]),
        cost=np.array([[0.9, 0.1], [0.4, 0.8]]),
        similarity=0.6,
        title="one and other",
    )
