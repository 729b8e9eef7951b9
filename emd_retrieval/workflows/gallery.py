"""Choosing queries worth a look, and handing their pictures to the reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from emd_retrieval.datasets import ImageCollection
from emd_retrieval.features import FeatureSet
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.matching.clusters import METHODS
from emd_retrieval.reports import (
    GalleryRow,
    MatchPicture,
    Neighbour,
    gallery_figure,
    match_figure,
    save_figure,
    short_label,
)
from emd_retrieval.retrieval import Evaluation, Ranking, RetrievalScores

Pixels = NDArray[np.uint8]

_SIDE = 160


@dataclass(frozen=True)
class ImageSide:
    """Query or gallery: features and the images they came from.

    Attributes:
        collection: The images.
        features: Their features; ``features.ids`` are rows of the collection.
    """

    collection: ImageCollection
    features: FeatureSet

    def label(self, row: int) -> str:
        """Class of the image behind a row of the features."""
        return self.collection.class_names[int(self.collection.labels[self._image(row)])]

    def image(self, row: int) -> Image.Image:
        """The image behind a row of the features."""
        return self.collection.load(self._image(row))

    def thumbnail(self, row: int) -> Pixels:
        """The same, small and square."""
        return np.asarray(ImageOps.fit(self.image(row), (_SIDE, _SIDE), Image.Resampling.LANCZOS))

    def _image(self, row: int) -> int:
        return int(self.features.ids[row])


def save_pictures(
    evaluation: Evaluation,
    query: ImageSide,
    gallery: ImageSide,
    output: str | Path,
    *,
    matcher: EMDMatcher,
    boxes: Callable[[Image.Image], Tensor | None],
    view: Callable[[Image.Image], Pixels],
) -> tuple[str, ...]:
    """Draw ``gallery.png`` and, where it can be told where the nodes lie, ``matches.png``.

    Args:
        evaluation: Two rankings, the baseline first.
        query: The queries.
        gallery: What was searched.
        output: Folder.
        matcher: The EMD similarity that ranked.
        boxes: Where the nodes of an image lie, as shares of its view. Shape of its result:
            ``[N, 4]``.
        view: The part of an image that the network saw.

    Returns:
        Names of the files written.
    """
    output = Path(output)
    before, after = list(evaluation.rankings)[:2]
    chosen = choose_queries(evaluation, query, gallery)
    rows = gallery_rows(evaluation, query, gallery, chosen)
    save_figure(gallery_figure(rows, before=before, after=after), output / "gallery.png")
    pictures = match_pictures(
        evaluation, query, gallery, chosen, matcher=matcher, boxes=boxes, view=view
    )
    if not pictures:
        return ("gallery.png",)
    save_figure(match_figure(pictures), output / "matches.png")
    return "gallery.png", "matches.png"


def choose_queries(
    evaluation: Evaluation,
    query: ImageSide,
    gallery: ImageSide,
    *,
    improved: int = 4,
    unchanged: int = 1,
    worsened: int = 1,
    neighbours: int = 5,
) -> list[int]:
    """Queries that gained most, one in the middle and one that lost most, each of its own class.

    What counts first is what the picture can show, right answers among the neighbours drawn; then
    MAP@R.

    Args:
        evaluation: Two rankings, the baseline first.
        query: The queries.
        gallery: What was searched.
        improved: How many of those that gained most.
        unchanged: How many of those nearest to the median change.
        worsened: How many of those that lost most.
        neighbours: How many answers of each ranking are drawn.

    Returns:
        Places in the evaluation's per-query tables.
    """
    old, new = _map_at_r(evaluation)
    rows = _scored_rows(evaluation)
    first, second = (
        (gallery.features.labels[ranking.rows[rows, :neighbours]]
         == query.features.labels[rows].unsqueeze(1)).sum(dim=1).numpy()
        for ranking in list(evaluation.rankings.values())[:2]
    )  # fmt: skip
    change = 100.0 * (second - first) + (new - old)
    order = np.argsort(-change, kind="stable")
    middle = np.argsort(np.abs(change - np.median(change)), kind="stable")
    chosen: list[int] = []
    for candidates, count in ((order, improved), (middle, unchanged), (order[::-1], worsened)):
        shown = {query.label(int(rows[i])) for i in chosen}
        wanted = len(chosen) + count
        for i in candidates:
            label = query.label(int(rows[i]))
            if len(chosen) == wanted:
                break
            if label not in shown:
                shown.add(label)
                chosen.append(int(i))
    return chosen


def gallery_rows(
    evaluation: Evaluation,
    query: ImageSide,
    gallery: ImageSide,
    chosen: Sequence[int],
    *,
    neighbours: int = 5,
) -> list[GalleryRow]:
    """The chosen queries with their first neighbours under both rankings.

    Args:
        evaluation: Two rankings, the baseline first.
        query: The queries.
        gallery: What was searched.
        chosen: Places in the per-query tables, see :func:`choose_queries`.
        neighbours: How many answers of each ranking.
    """
    first, second = list(evaluation.rankings.values())[:2]
    neighbours = min(neighbours, first.depth, second.depth)
    old, new = _map_at_r(evaluation)
    rows = _scored_rows(evaluation)

    def answers(ranking: Ranking, row: int) -> list[Neighbour]:
        wanted = query.label(row)
        return [
            Neighbour(gallery.thumbnail(answer), gallery.label(answer) == wanted,
                      gallery.label(answer))
            for answer in ranking.rows[row, :neighbours].tolist()
        ]  # fmt: skip

    return [
        GalleryRow(
            query=query.thumbnail(int(rows[i])),
            label=query.label(int(rows[i])),
            caption=f"MAP@R {old[i]:.0f} → {new[i]:.0f}",
            before=answers(first, int(rows[i])),
            after=answers(second, int(rows[i])),
        )
        for i in chosen
    ]


def match_pictures(
    evaluation: Evaluation,
    query: ImageSide,
    gallery: ImageSide,
    chosen: Sequence[int],
    *,
    matcher: EMDMatcher,
    boxes: Callable[[Image.Image], Tensor | None],
    view: Callable[[Image.Image], Pixels],
    most: int = 3,
) -> list[MatchPicture]:
    """The chosen queries matched with their first answer, where that answer is right.

    Args:
        evaluation: Two rankings, the baseline first.
        query: The queries.
        gallery: What was searched.
        chosen: Places in the per-query tables.
        matcher: The EMD similarity that ranked.
        boxes: Where the nodes of an image lie, as shares of its view; nothing is drawn where it
            gives ``None``.
        view: The part of an image that the network saw.
        most: At most so many.
    """
    if matcher.weights in METHODS:
        return []  # nodes that are clusters lie nowhere in the image
    second = list(evaluation.rankings.values())[1]
    rows = _scored_rows(evaluation)
    pictures: list[MatchPicture] = []
    for i in chosen:
        row = int(rows[i])
        answer = int(second.rows[row, 0])
        if len(pictures) == most or query.label(row) != gallery.label(answer):
            continue
        sides = query.image(row), gallery.image(answer)
        places = [boxes(image) for image in sides]
        if places[0] is None or places[1] is None:
            return []
        match = matcher.match(query.features.nodes[row], gallery.features.nodes[answer])
        pictures.append(
            MatchPicture(
                query=view(sides[0]),
                reference=view(sides[1]),
                boxes=places[0].numpy(),
                reference_boxes=places[1].numpy(),
                query_weights=match.query_weights.numpy(),
                reference_weights=match.reference_weights.numpy(),
                flow=match.flow.numpy(),
                cost=match.cost.numpy(),
                similarity=float(match.similarity),
                title=f"{short_label(query.label(row))}: query and first answer",
            )
        )
    return pictures


def _map_at_r(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = (score.per_query["MAP@R"].to_numpy() for score in _first_two(evaluation))
    return first, second


def _scored_rows(evaluation: Evaluation) -> Tensor:
    return _first_two(evaluation)[0].queries


def _first_two(evaluation: Evaluation) -> list[RetrievalScores]:
    return list(evaluation.scores.values())[:2]
