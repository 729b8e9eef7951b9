"""Choosing queries for the gallery figure and handing their pictures to the report."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from emd_retrieval.datasets import ImageCollection
from emd_retrieval.reports.gallery import GalleryRow, Neighbour
from emd_retrieval.retrieval import Evaluation, Ranking

_SIDE = 160


def gallery_rows(
    evaluation: Evaluation,
    query: ImageCollection,
    gallery: ImageCollection,
    query_ids: Tensor,
    gallery_ids: Tensor,
    *,
    improved: int = 4,
    unchanged: int = 1,
    worsened: int = 1,
    neighbours: int = 5,
) -> list[GalleryRow]:
    """Queries that gained most, one in the middle and one that lost most, each of its own class.

    Args:
        evaluation: Two rankings, the baseline first.
        query: Where the query images are.
        gallery: Where the gallery images are.
        query_ids: Image in ``query`` of each ranked query. Shape: ``[Q]``.
        gallery_ids: Image in ``gallery`` of each gallery row. Shape: ``[R]``.
        improved: How many of those that gained most.
        unchanged: How many with the smallest change.
        worsened: How many of those that lost most.
        neighbours: How many answers of each method.
    """
    (before, first), (after, second) = list(evaluation.rankings.items())[:2]
    old, new = (evaluation.scores[name].per_query["MAP@R"].to_numpy() for name in (before, after))
    rows = evaluation.scores[before].queries
    labels = query.labels[query_ids[rows].numpy()]
    change = new - old
    order = np.argsort(-change, kind="stable")
    middle = np.argsort(np.abs(change - np.median(change)), kind="stable")
    taken: list[int] = []
    for candidates, count in ((order, improved), (middle, unchanged), (order[::-1], worsened)):
        taken += _of_new_classes(candidates, labels, taken, count)
    neighbours = min(neighbours, first.depth, second.depth)
    return [
        GalleryRow(
            query=_thumbnail(query, int(query_ids[rows[i]])),
            label=query.class_names[labels[i]],
            caption=f"MAP@R {old[i]:.0f} → {new[i]:.0f}",
            before=_answers(
                first, int(rows[i]), gallery, gallery_ids, labels[i], neighbours, query
            ),
            after=_answers(
                second, int(rows[i]), gallery, gallery_ids, labels[i], neighbours, query
            ),
        )
        for i in taken
    ]


def _of_new_classes(
    candidates: np.ndarray, labels: np.ndarray, taken: list[int], count: int
) -> list[int]:
    """The first ``count`` candidates whose classes are not shown yet."""
    shown = {labels[i] for i in taken}
    chosen: list[int] = []
    for i in candidates:
        if len(chosen) == count:
            break
        if labels[i] not in shown:
            shown.add(labels[i])
            chosen.append(int(i))
    return chosen


def _answers(
    ranking: Ranking,
    row: int,
    gallery: ImageCollection,
    gallery_ids: Tensor,
    label: int,
    count: int,
    query: ImageCollection,
) -> list[Neighbour]:
    wanted = query.class_names[label]
    answers = []
    for image in gallery_ids[ranking.rows[row, :count]].tolist():
        name = gallery.class_names[gallery.labels[image]]
        answers.append(Neighbour(_thumbnail(gallery, image), name == wanted, name))
    return answers


def _thumbnail(collection: ImageCollection, index: int) -> np.ndarray:
    image = ImageOps.fit(collection.load(index), (_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
