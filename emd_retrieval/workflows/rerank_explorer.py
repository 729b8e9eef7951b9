"""What ``rerank`` keeps for the explorer: answers before and after, right or wrong not known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from emd_retrieval._checks import check_positive
from emd_retrieval.datasets import UnreadableImageError, decode_rgb
from emd_retrieval.datasets.image_folder import IMAGE_SUFFIXES
from emd_retrieval.reports.explorer import ExplorerData, Query
from emd_retrieval.retrieval import Candidates, LocalFeatureStore, Reranking
from emd_retrieval.workflows.explorer import Album, PictureSource, match_pairs
from emd_retrieval.workflows.gallery import Pixels
from emd_retrieval.workflows.images import read_image_list
from emd_retrieval.workflows.queries import Queries, SearchSettings, extraction_of, matcher_of

_NEIGHBOURS = 6
_METHODS = ("first stage", "re-ranked by EMD")


def collect_reranking(
    settings: SearchSettings,
    store: LocalFeatureStore,
    queries: Queries,
    first: Candidates,
    answer: Reranking,
    *,
    images: Path | None = None,
    most: int = 200,
) -> ExplorerData:
    """Queries with their answers before and after re-ranking, pictures where they are at hand.

    At most ``most`` queries are kept, in turn one with a new first answer, one in another order
    and one as it was.

    Args:
        settings: Of the search.
        store: The gallery.
        queries: Pictures and matches need queries that came as images.
        first: The first stage's answers.
        answer: The re-ranked ones, as arrays.
        images: The store's images: a folder, list or table that gives its ids.
        most: At most so many.

    Raises:
        FileNotFoundError: If none of the answers is among the images.
        ValueError: If ``most`` is not positive.
    """
    check_positive("most", most)
    depth = min(_NEIGHBOURS, first.ids.shape[1], answer.ids.shape[1])
    before, after = first.ids[:, :depth], answer.ids[:, :depth]
    scores = np.full(before.shape, np.nan) if first.scores is None else first.scores[:, :depth]
    similarities = np.stack([scores, answer.similarities[:, :depth]], axis=1)
    order = list(_in_turn(before, after))[:most]
    gallery = _Files(images)
    shown = np.unique(np.concatenate([before[order].ravel(), after[order].ravel()]).astype(str))
    if images is not None and not any(name in gallery for name in shown):
        raise FileNotFoundError(
            f"images: none of the answers is among the images of {images}, for instance "
            f"{next((name for name in shown if name not in ('-1', 'None')), '')!r}"
        )
    album = Album(*_geometry(settings, store, queries))
    files = _Files(None if queries.extractor is None else settings.queries)
    asked = files.source("query", queries.ids)
    answers = gallery.source("gallery", store.ids)
    rows = _Rows(store)
    wanted = [(asked, i) for i in order]
    wanted += [
        (answers, row)
        for i in order
        for part in (before[i], after[i])
        for row in rows(part)
        if row >= 0
    ]
    album.choose_side(wanted)
    kept: list[Query] = []
    for i in order:
        if album.full:
            break
        neighbours = [
            [album.place(answers, row) if row >= 0 else -1 for row in rows(part)]
            for part in (before[i], after[i])
        ]
        kept.append(
            Query(
                picture=album.place(asked, i),
                scores=(float("nan"), float("nan")),
                neighbours=np.array(neighbours, np.int32),
                similarities=similarities[i].astype(np.float32),
            )
        )
    return ExplorerData(
        methods=_METHODS,
        metric="",
        class_names=(),
        total=len(queries),
        pictures=album.pictures,
        queries=kept,
        matches=dict(
            match_pairs(
                kept,
                album,
                matcher_of(settings, store),
                lambda places: queries.nodes[places],
                lambda places: store.nodes(np.asarray(places)),
            )
        ),
        classes=(),
    )


class _Rows:
    """Rows of ids in the store; -1 where there is no id."""

    def __init__(self, store: LocalFeatureStore) -> None:
        self._store = store

    def __call__(self, ids: NDArray[Any]) -> list[int]:
        there = [number for number in ids.tolist() if number not in (None, -1)]
        rows = iter(self._store.rows_of(there).tolist() if there else ())
        return [-1 if number in (None, -1) else next(rows) for number in ids.tolist()]


class _Files:
    """Image files by the id that a store or a query has."""

    def __init__(self, source: Path | None) -> None:
        self._paths: dict[str, Path] = {}
        if source is None:
            return
        if source.suffix.lower() in IMAGE_SUFFIXES and source.is_file():
            self._paths = {source.name: source}
            return
        listed = read_image_list(source)
        names = (str(name) for name in np.asarray(listed.ids).tolist())
        self._paths = dict(zip(names, listed.paths, strict=True))

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def source(self, side: str, ids: Sequence[Any] | NDArray[Any]) -> PictureSource:
        """Pictures by row, of the files with these ids."""
        return PictureSource(
            side,
            lambda row: _decoded(self._paths.get(str(ids[row]))),
            lambda row: str(ids[row]),
        )


def _decoded(path: Path | None) -> Image.Image | None:
    if path is None:
        return None
    try:
        return decode_rgb(path)
    except UnreadableImageError:
        return None


def _geometry(
    settings: SearchSettings, store: LocalFeatureStore, queries: Queries
) -> tuple[Any, Any]:
    """Where nodes lie, and what the network saw; of arrays neither is known."""
    if queries.extractor is None:
        return (lambda image: None), _whole
    extractor, made = queries.extractor, extraction_of(settings, store)

    def boxes(image: Image.Image) -> Tensor | None:
        return extractor.node_boxes(image, resize=made.resize, crop=made.crop, seed=made.seed)

    return boxes, extractor.evaluation_view(resize=made.resize, crop=made.crop)


def _whole(image: Image.Image) -> Pixels:
    return np.asarray(image)


def _in_turn(before: NDArray[Any], after: NDArray[Any]) -> Iterator[int]:
    """Queries with a new first answer, in another order, as they were, and again."""
    first = before[:, 0] != after[:, 0]
    other = (before != after).any(axis=1) & ~first
    groups = [np.flatnonzero(part).tolist() for part in (first, other, ~first & ~other)]
    for turn in zip_longest(*groups):
        yield from (int(i) for i in turn if i is not None)
