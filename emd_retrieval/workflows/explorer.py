"""What a run keeps for the explorer: queries worth a look, small pictures, matches."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from emd_retrieval._checks import check_positive
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.matching.clusters import METHODS
from emd_retrieval.reports.explorer import ClassResult, ExplorerData, Match, Picture, Query
from emd_retrieval.retrieval import Evaluation
from emd_retrieval.workflows.gallery import ImageSide, Pixels

EXPLORER_FILE = "explorer.npz"

_METRIC = "MAP@R"
_NEIGHBOURS = 6
_SIDES = (224, 160, 112)  # pixels, the longer side of a kept picture; smaller where there are many
_QUALITY = 80
_MOST_BYTES = 16_000_000  # of pictures; what a phone still opens
_TRIED = 12  # pictures by which a side is chosen
_LEAST_FLOW = 1e-4  # of the mass; dense couplings move a little everywhere
_PAIRS_AT_ONCE = 256

Boxes = Callable[[Image.Image], Tensor | None]
View = Callable[[Image.Image], Pixels]


def collect_explorer(
    evaluation: Evaluation,
    query: ImageSide,
    gallery: ImageSide,
    *,
    matcher: EMDMatcher,
    boxes: Boxes,
    view: View,
    queries: int = 200,
) -> ExplorerData:
    """Queries worth a look with their neighbours, pictures and matches.

    At most ``queries`` are kept, in turn the one that gained most, the one that lost most and one
    that did not change. Pictures are smaller where there are many; fewer queries are kept where
    even small ones would exceed 16 MB.

    Args:
        evaluation: Two rankings, the baseline first.
        query: The queries.
        gallery: What was searched; the very object ``query`` where the queries were.
        matcher: The EMD similarity that ranked.
        boxes: Where the nodes of an image lie, as shares of its view; without them there are
            neighbours and no matches. Shape of its result: ``[N, 4]``.
        view: The part of an image that the network saw.
        queries: At most so many.

    Raises:
        ValueError: If ``queries`` is not positive.
    """
    check_positive("queries", queries)
    if gallery.collection.class_names != query.collection.class_names:
        raise ValueError("gallery: expected the classes of query, in the same order")
    names = list(evaluation.rankings)[:2]
    rankings = [evaluation.rankings[name] for name in names]
    scores = [evaluation.scores[name] for name in names]
    rows = scores[0].queries
    before, after = (score.per_query[_METRIC].to_numpy() for score in scores)
    depth = min(_NEIGHBOURS, *(ranking.depth for ranking in rankings))
    order = list(_in_turn(after - before))[:queries]

    def source_of(side: ImageSide, name: str) -> PictureSource:
        def load(row: int) -> Image.Image:
            return side.image(row)

        return PictureSource(
            side=name,
            load=load,
            name=lambda row: side.collection.image_name(int(side.features.ids[row])),
            label=lambda row: int(side.collection.labels[int(side.features.ids[row])]),
        )

    asked = source_of(query, "query")
    found = asked if query is gallery else source_of(gallery, "gallery")
    album = Album(boxes, view)
    wanted = [(asked, int(rows[i])) for i in order]
    wanted += [
        (found, answer)
        for i in order
        for ranking in rankings
        for answer in ranking.rows[int(rows[i]), :depth].tolist()
    ]
    album.choose_side(wanted)
    kept: list[Query] = []
    for i in order:
        if album.full:
            break
        row = int(rows[i])
        answers = [ranking.rows[row, :depth].tolist() for ranking in rankings]
        kept.append(
            Query(
                picture=album.place(asked, row),
                scores=(float(before[i]), float(after[i])),
                neighbours=np.array(
                    [[album.place(found, place) for place in answer] for answer in answers],
                    np.int32,
                ),
                similarities=torch.stack(
                    [ranking.scores[row, :depth].float() for ranking in rankings]
                ).numpy(),
            )
        )
    return ExplorerData(
        methods=(names[0], names[1]),
        metric=_METRIC,
        class_names=query.collection.class_names,
        total=len(rows),
        pictures=album.pictures,
        queries=kept,
        matches=dict(
            match_pairs(
                kept,
                album,
                matcher,
                lambda places: query.features.nodes[places],
                lambda places: gallery.features.nodes[places],
            )
        ),
        classes=_class_results(query, rows, before, after),
    )


@dataclass(frozen=True, eq=False)
class PictureSource:
    """Images by row.

    Attributes:
        side: What tells rows of one source from those of another.
        load: The image of a row; ``None`` where it is not at hand.
        name: What it is called.
        label: Index of its class; -1 where classes are not known.
    """

    side: str
    load: Callable[[int], Image.Image | None]
    name: Callable[[int], str]
    label: Callable[[int], int] = lambda row: -1


@dataclass
class Album:
    """The pictures that are kept, each once.

    Attributes:
        boxes: Where the nodes of an image lie, as shares of its view; ``None`` where it cannot be
            told.
        view: The part of an image that the network saw.
        pictures: In the order in which they came.
        rows: The row of each in its source.
        side: Pixels of the longer side.
    """

    boxes: Boxes
    view: View
    pictures: list[Picture] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    side: int = _SIDES[0]
    _places: dict[tuple[str, int], int] = field(default_factory=dict)
    _bytes: int = 0

    @property
    def full(self) -> bool:
        """Whether the pictures are as many bytes as a page should have."""
        return self._bytes > _MOST_BYTES

    def choose_side(self, wanted: Sequence[tuple[PictureSource, int]]) -> None:
        """Take the largest side with which all pictures should fit, judged by some of them."""
        distinct = list({(source.side, row): (source, row) for source, row in wanted}.values())
        tried = distinct[:: max(1, len(distinct) // _TRIED)]
        images = [image for source, row in tried if (image := source.load(row)) is not None]
        for self.side in _SIDES:
            sizes = [len(self._encoded(image)[1]) for image in images]
            if len(distinct) * (sum(sizes) / max(1, len(sizes))) < _MOST_BYTES:
                break

    def place(self, source: PictureSource, row: int) -> int:
        """Where the picture of a row is, which is made the first time."""
        key = source.side, row
        if key not in self._places:
            self._places[key] = len(self.pictures)
            self.pictures.append(self._picture(source, row))
            self.rows.append(row)
            self._bytes += len(self.pictures[-1].jpeg)
        return self._places[key]

    def _picture(self, source: PictureSource, row: int) -> Picture:
        image = source.load(row)
        name, label = source.name(row), source.label(row)
        if image is None:
            return Picture(name, label, (self.side, self.side), b"")
        size, jpeg = self._encoded(image)
        places = self.boxes(image)
        where = None if places is None else places.numpy().astype(np.float32)
        return Picture(name, label, size, jpeg, where)

    def _encoded(self, image: Image.Image) -> tuple[tuple[int, int], bytes]:
        small = Image.fromarray(self.view(image))
        small.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        return small.size, buffer.getvalue()


def match_pairs(
    queries: Sequence[Query],
    album: Album,
    matcher: EMDMatcher,
    query_nodes: Callable[[list[int]], Tensor],
    gallery_nodes: Callable[[list[int]], Tensor],
) -> Iterator[tuple[tuple[int, int], Match]]:
    """The match of every query with each of its neighbours, where nodes lie somewhere.

    Args:
        queries: As they are kept; a neighbour below zero is none.
        album: Their pictures.
        matcher: The EMD similarity.
        query_nodes: From rows of the queries to their nodes. Shape of its result: ``[P, N, D]``.
        gallery_nodes: The same of what was searched.

    Yields:
        Query picture and neighbour picture, and their match.
    """
    if matcher.weights in METHODS:
        return  # nodes that are clusters lie nowhere in the image
    pairs = sorted({(q.picture, int(p)) for q in queries for p in q.neighbours.ravel() if p >= 0})
    pairs = [pair for pair in pairs if all(album.pictures[p].boxes is not None for p in pair)]
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        match = matcher.match(
            query_nodes([album.rows[pair[0]] for pair in part]),
            gallery_nodes([album.rows[pair[1]] for pair in part]),
        )
        for number, pair in enumerate(part):
            yield (
                pair,
                sparse_match(
                    float(match.similarity[number]),
                    match.query_weights[number].numpy(),
                    match.reference_weights[number].numpy(),
                    match.flow[number].numpy(),
                    match.cost[number].numpy(),
                ),
            )


def sparse_match(
    similarity: float,
    query_weights: NDArray[np.float32],
    reference_weights: NDArray[np.float32],
    flow: NDArray[np.float32],
    cost: NDArray[np.float32],
) -> Match:
    """A match with only what moves.

    Args:
        similarity: Of the whole match.
        query_weights: Shape: ``[N]``.
        reference_weights: Shape: ``[M]``.
        flow: Shape: ``[N, M]``.
        cost: Shape: ``[N, M]``.
    """
    moved = np.argwhere(flow > _LEAST_FLOW)
    return Match(
        similarity=similarity,
        query_weights=query_weights,
        reference_weights=reference_weights,
        pairs=moved.astype(np.uint16),
        flow=flow[tuple(moved.T)],
        cost=cost[tuple(moved.T)],
    )


def _in_turn(change: NDArray[np.float64]) -> Iterator[int]:
    """Places of queries: the most improved, the most worsened, an unchanged one, and again."""
    order = np.argsort(-change, kind="stable")
    groups = [
        [int(i) for i in order if change[i] > 0],
        [int(i) for i in order[::-1] if change[i] < 0],
        [int(i) for i in order if change[i] == 0],
    ]
    for turn in range(max(map(len, groups))):
        yield from (group[turn] for group in groups if turn < len(group))


def _class_results(
    query: ImageSide, rows: Tensor, before: NDArray[np.float64], after: NDArray[np.float64]
) -> list[ClassResult]:
    table = pd.DataFrame(
        {"name": [query.label(int(r)) for r in rows], "before": before, "after": after}
    )
    return [
        ClassResult(str(name), len(part), float(part["before"].mean()), float(part["after"].mean()))
        for name, part in table.groupby("name")
    ]
