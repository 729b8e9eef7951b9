"""Candidates: what a first stage hands over for each query, by the ids of the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval.retrieval.store import LocalFeatureStore
from emd_retrieval.retrieval.store.store import ABSENT as ABSENT

Ids = NDArray[np.int64] | NDArray[np.object_]
IdsLike = Tensor | NDArray[Any] | Sequence[Sequence[int]] | Sequence[Sequence[str | None]]


@dataclass(frozen=True)
class Candidates:
    """For each query ids of the gallery, the best first.

    Attributes:
        ids: int64, -1 where there is none; or strings as objects, ``None`` where there is none.
            Shape: ``[Q, C]``.
        scores: Higher is better; ``-inf`` where there is no id. ``None`` where the source has none.
            Shape: ``[Q, C]``, float32.
    """

    ids: Ids
    scores: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2:
            raise ValueError(f"ids: expected shape [Q, C], got {list(self.ids.shape)}")
        if self.scores is not None and self.scores.shape != self.ids.shape:
            raise ValueError(
                f"scores: expected the shape of ids, {list(self.ids.shape)}, "
                f"got {list(self.scores.shape)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def top(self, count: int) -> Candidates:
        """The first ``count`` of every query."""
        return Candidates(
            self.ids[:, :count], None if self.scores is None else self.scores[:, :count]
        )

    def without(self, own: Ids) -> Candidates:
        """Leave one id a query out, usually the query itself; the others move up.

        Args:
            own: What to leave out. Shape: ``[Q]``.

        Returns:
            Candidates of the same depth; the last place of a query that lost one is absent.
        """
        drop = self.ids == own[:, None]
        # One a query: a source that names an id twice is told so where its rows are looked up.
        drop &= drop.cumsum(axis=1) == 1
        order = np.argsort(drop, axis=1, kind="stable")
        lost = np.take_along_axis(drop, order, axis=1)
        ids: Any = np.take_along_axis(self.ids, order, axis=1)
        ids[lost] = None if ids.dtype == object else ABSENT
        if self.scores is None:
            return Candidates(ids)
        scores = np.take_along_axis(self.scores, order, axis=1)
        scores[lost] = -np.inf
        return Candidates(ids, scores)


def as_ids(name: str, ids: IdsLike) -> Ids:
    """Ids as an int64 or object array of two dimensions.

    Raises:
        TypeError: If they are neither whole numbers nor strings.
        ValueError: If they are not two-dimensional.
    """
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected as many candidates of every query ([Q, C]); fill short rows up with "
            "-1, or None for ids that are strings"
        ) from error
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape [Q, C], got {list(array.shape)}")
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind in "UO":
        return array.astype(object)
    if not array.size:
        return array.astype(np.int64)
    raise TypeError(f"{name}: expected whole numbers or strings, got {array.dtype}")


def rows_of(store: LocalFeatureStore, ids: Ids) -> NDArray[np.int64]:
    """Positions of the candidates in the store, -1 for absent ones. Shape: ``[Q, C]``.

    Raises:
        TypeError: If the store's ids are of the other kind.
        ValueError: If ids are not in the store, or a query has one twice.
    """
    there = ids != ABSENT if ids.dtype != object else _is_there(ids)
    if there.all():
        rows = store.rows_of(ids.ravel()).numpy().reshape(ids.shape)
    else:
        wanted = ids[there]
        rows = np.full(ids.shape, ABSENT, np.int64)
        if len(wanted) or ids.dtype != object:
            rows[there] = store.rows_of(wanted).numpy()
    in_order = np.sort(rows, axis=1)
    twice = in_order[:, 1:] == in_order[:, :-1]
    if twice.any():
        twice &= in_order[:, 1:] != ABSENT
    if twice.any():
        query, place = np.argwhere(twice)[0]
        name = ids_of(store, in_order[query, place : place + 1]).tolist()[0]
        raise ValueError(
            f"candidate_ids: expected each id once a query, but query {query} has {name!r} twice "
            f"({int(twice.any(axis=1).sum())} of {len(ids)} queries have such ids)"
        )
    return rows


def ids_of(store: LocalFeatureStore, rows: NDArray[np.int64]) -> Ids:
    """Ids at some positions, absent ones as they came. Shape: that of ``rows``."""
    there = rows != ABSENT
    found = store.ids_at(rows[there])
    ids: Ids
    if isinstance(found, np.ndarray):
        ids = np.full(rows.shape, ABSENT, np.int64)
    else:
        ids = np.full(rows.shape, None, object)
    ids[there] = found
    return ids


def as_scores(name: str, scores: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Scores as float32 of the candidates' shape.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If the shape does not fit.
    """
    if isinstance(scores, Tensor):
        scores = scores.detach().to(torch.float32).cpu().numpy()
    array = np.asarray(scores)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
    return array.astype(np.float32, copy=False)


def _is_there(ids: NDArray[Any]) -> NDArray[np.bool_]:
    flat = [name is not None and name != "" for name in ids.ravel().tolist()]
    return np.array(flat, dtype=bool).reshape(ids.shape)
