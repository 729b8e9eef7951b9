"""Candidates that some other system found already, from a table or an archive of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._tables import TABLES, read_arrays, read_table
from emd_retrieval.retrieval.candidates import ABSENT, Candidates, Ids, as_ids, as_scores
from emd_retrieval.retrieval.shortlists.base import check_count, check_ids_in_store
from emd_retrieval.retrieval.store import LocalFeatureStore


class CandidateTable:
    """A ready shortlist: for each query the ids and scores that another system gave it.

    It answers its queries in their order, whatever the vectors: :meth:`of` chooses queries.

    Args:
        queries: Ids of the queries, each once.
        candidates: Of each query, best first.
        name: What messages call the table.

    Raises:
        ValueError: If there is not one row a query, or a query is there twice.
    """

    def __init__(
        self, queries: Sequence[Any], candidates: Candidates, *, name: str = "the table"
    ) -> None:
        if len(queries) != len(candidates):
            raise ValueError(
                f"queries: expected one a row of candidates ({len(candidates)}), got {len(queries)}"
            )
        self.queries = tuple(queries)
        self.candidates = candidates
        self.name = name
        self._place = {query: row for row, query in enumerate(self.queries)}
        if len(self._place) < len(self.queries):
            twice = [q for row, q in enumerate(self.queries) if self._place[q] != row]
            raise ValueError(
                f"queries: expected each query of {name} once, got {len(twice)} more than once, "
                f"the first is {twice[0]!r}"
            )

    def __len__(self) -> int:
        return len(self.queries)

    @staticmethod
    def read(path: str | Path, *, ids: str | None = None) -> CandidateTable:
        """Read candidates from a file.

        In a CSV ids are whole numbers where all of them are, in their plain form; else text.

        Args:
            path: A table, ``.parquet`` or ``.csv``: columns ``query``, ``id`` and optionally
                ``score`` (higher is better) or ``rank``, a row a candidate. Or ``.npz`` with arrays
                ``ids [Q, C]`` and optionally ``scores [Q, C]`` and ``queries [Q]`` (by default the
                rows' numbers). An id of -1, or no text, is a place without a candidate.
            ids: ``"string"`` takes the ids of a CSV as text even if all are numbers.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read, or lacks a column or array.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"candidates: no file {str(path)!r}")
        if path.suffix == ".npz":
            return _read_arrays(path)
        if path.suffix not in TABLES:
            raise ValueError(f"candidates: expected .parquet, .csv or .npz, got {path.name}")
        try:
            table = read_table(path, ("query", "id"))
        except ValueError as error:
            raise ValueError(f"candidates: {error}") from error
        if path.suffix == ".csv" and ids == "string" and "id" in table:
            # A CSV cannot say that its digits are text.
            table["id"] = table["id"].where(table["id"].isna(), table["id"].astype(str))
        return _from_rows(table, path.name)

    def of(self, queries: Sequence[Any]) -> CandidateTable:
        """The candidates of some queries, in their order.

        Raises:
            ValueError: If the table has no candidates for one.
        """
        missing = [query for query in queries if query not in self._place]
        if missing:
            hint = ""
            if str(missing[0]) in {str(query) for query in self.queries}:
                hint = "; it has ids as numbers where the queries have text, or the other way round"
            elif self.queries:
                hint = (
                    f"; the first that it has is {self.queries[0]!r}. Queries are called as their "
                    "files are, those of an .npy 0, 1, 2, ..., those of an .npz as its array 'ids'"
                )
            raise ValueError(
                f"candidates: {self.name} has none for {len(missing)} of {len(queries)} queries, "
                f"the first is {missing[0]!r}{hint}"
            )
        rows = [self._place[query] for query in queries]
        ids, scores = self.candidates.ids[rows], self.candidates.scores
        chosen = Candidates(ids, None if scores is None else scores[rows])
        return CandidateTable(queries, chosen, name=self.name)

    def search(self, vectors: Tensor | NDArray[Any], k: int) -> Candidates:
        """The first ``k`` candidates of every query; the vectors are counted, not read.

        Raises:
            ValueError: If there is not one vector a query.
        """
        check_count(k)
        if len(vectors) != len(self):
            raise ValueError(
                f"vectors: expected one for each of the {len(self)} queries of {self.name}, "
                f"got {len(vectors)}"
            )
        return self.candidates.top(k)

    def check(self, store: LocalFeatureStore) -> None:
        """Raise unless the candidates' ids are in the store.

        Raises:
            ValueError: If some are not, with the numbers.
        """
        ids = self.candidates.ids
        if ids.dtype == object:
            there: Any = sorted({name for name in ids.ravel().tolist() if name})
        else:
            there = np.unique(ids[ids != ABSENT])
        check_ids_in_store(there, store, self.name)

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {
            "first_stage": "candidates",
            "candidates": self.name,
            "queries": len(self),
            "depth": self.candidates.ids.shape[1],
        }


def _read_arrays(path: Path) -> CandidateTable:
    try:
        arrays = read_arrays(path)
    except ValueError as error:
        raise ValueError(f"candidates: {error}") from error
    if isinstance(arrays, np.ndarray):
        raise ValueError(f"candidates: {path.name} is a single array, expected an archive (.npz)")
    if "ids" not in arrays:
        raise ValueError(
            f"candidates: expected an array 'ids' in {path.name}, "
            f"got {', '.join(sorted(arrays)) or 'none'}"
        )
    ids = as_ids(f"ids of {path.name}", arrays["ids"])
    scores = arrays.get("scores")
    if scores is not None:
        scores = as_scores(f"scores of {path.name}", scores, ids.shape)
    queries = arrays.get("queries", np.arange(len(ids)))
    return CandidateTable(queries.tolist(), Candidates(ids, scores), name=path.name)


def _from_rows(table: pd.DataFrame, name: str) -> CandidateTable:
    for column in ("query", "id"):
        if column not in table:
            raise ValueError(
                f"candidates: expected a column {column!r} in {name}, "
                f"got {', '.join(map(str, table.columns)) or 'no columns'}"
            )
        if table[column].isna().any():
            raise ValueError(f"candidates: {name} has rows without a value for {column!r}")
    if not len(table):
        raise ValueError(f"candidates: {name} has no rows")
    for column in {"score", "rank"} & set(table.columns):
        numeric = pd.api.types.is_numeric_dtype(table[column])
        if not numeric or not np.isfinite(table[column].to_numpy(dtype=np.float64)).all():
            raise ValueError(f"candidates: expected a number in every row of {column!r} in {name}")
    # A place without a candidate may be there as often as it likes.
    twice = table.duplicated(["query", "id"]) & (table["id"] != ABSENT)
    if twice.any():
        query, identity = (table.loc[twice, name].tolist()[0] for name in ("query", "id"))
        raise ValueError(
            f"candidates: expected each id once a query in {name}, got {identity!r} more than once "
            f"for query {query!r} ({int(twice.sum())} such rows)"
        )
    if "rank" in table:
        table = table.sort_values("rank", kind="stable")
    elif "score" in table:
        table = table.sort_values("score", ascending=False, kind="stable")
    row, queries = pd.factorize(table["query"])
    place = table.groupby(row, sort=False).cumcount().to_numpy()
    shape = len(queries), int(place.max()) + 1
    ids: Ids
    if pd.api.types.is_integer_dtype(table["id"]):
        ids = np.full(shape, -1, np.int64)
        ids[row, place] = table["id"].to_numpy(dtype=np.int64)
    else:
        ids = np.full(shape, None, object)
        ids[row, place] = table["id"].astype(str).to_numpy()
    scores = None
    if "score" in table:
        scores = np.full(shape, -np.inf, np.float32)
        scores[row, place] = table["score"].to_numpy(dtype=np.float32)
    return CandidateTable(queries.tolist(), Candidates(ids, scores), name=name)
