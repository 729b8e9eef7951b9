"""Reading what people bring: embeddings, labels and rankings as ``.npy``, parquet or CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emd_retrieval._checks import check_finite
from emd_retrieval._tables import read_arrays, read_table
from emd_retrieval.features import global_vectors, unpack
from emd_retrieval.retrieval import Ranking
from emd_retrieval.retrieval.metrics import relevant_counts


@dataclass(frozen=True)
class RankingTable:
    """A ranking read from a file, with the labels it is scored by.

    Attributes:
        ranking: Gallery rows for each query.
        queries: Ids of the queries, as the file has them.
        query_labels: Shape: ``[Q]``.
        gallery_labels: Shape: ``[R]``.
        gallery_includes_query: The first Q gallery rows are the queries.
    """

    ranking: Ranking
    queries: tuple[Any, ...]
    query_labels: Tensor
    gallery_labels: Tensor
    gallery_includes_query: bool


def read_matrix(
    path: Path, channels: int | None, global_node: int | None
) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """Read embeddings.

    Args:
        path: ``.npy`` of ``[n, N * D]``, ``[n, N, D]`` or ``[n, D]``; or parquet with one row an
            image: numeric columns, or one list column ``embedding``, and optionally ``label``.
        channels: D of packed sets; without it a 2-D matrix is plain vectors.
        global_node: See :func:`emd_retrieval.features.global_vectors`.

    Returns:
        Nodes ``[n, N, D]``, global vectors ``[n, D]``, and the labels if the file has them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or does not fit ``channels``.
    """
    labels = None
    if path.suffix == ".npy":
        array = _read_npy(path)
    elif path.suffix == ".npz":
        raise ValueError(
            f"embeddings: expected an array (.npy) or a table (.parquet), got {path.name}"
        )
    else:
        table = _read_table(path)
        if "label" in table:
            labels = table.pop("label").to_numpy()
        table = table.drop(columns=[c for c in ("id", "path") if c in table])
        array = _matrix_of(table, path)
    if array.dtype.kind not in "fiu" or array.ndim not in (2, 3) or not array.size:
        raise ValueError(
            f"embeddings: expected numbers of shape [n, N*D], [n, N, D] or [n, D] in {path.name}, "
            f"got {array.dtype} {list(array.shape)}"
        )
    tensor = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
    if tensor.ndim == 3:
        if channels is not None and tensor.shape[2] != channels:
            raise ValueError(
                f"channels: {path.name} holds sets of {tensor.shape[2]} channels, got {channels}"
            )
        nodes = tensor
    else:
        width = tensor.shape[1] if channels is None else channels
        nodes = unpack(tensor, width, name=f"embeddings ({path.name})")
    check_finite(f"embeddings ({path.name})", nodes)
    return nodes, global_vectors(nodes, global_node), labels


def read_labels(
    path: Path | None,
    own: np.ndarray | None,
    count: int,
    embeddings: Path,
    names: dict[Any, int] | None = None,
    *,
    option: str = "labels",
) -> tuple[Tensor, dict[Any, int]]:
    """Labels as numbers, and the number of each name.

    Args:
        path: ``.npy`` (numbers or strings), or parquet or CSV with a ``label`` column.
        own: Labels that the embeddings' file had; used where ``path`` is ``None``.
        count: How many there must be.
        embeddings: The embeddings' file, for messages.
        names: Numbers given before, for labels that must agree with those of another file.
        option: What the caller calls these labels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are no labels, or not one an embedding.
    """
    if path is not None:
        is_array = path.suffix == ".npy"
        values = _read_npy(path) if is_array else _column(_read_table(path), "label", path)
    elif own is not None:
        values = own
    else:
        raise ValueError(
            f"{option}: {embeddings.name} has no column 'label'; "
            f"pass a labels file (--{option.replace('_', '-')} FILE)"
        )
    if values.shape != (count,):
        raise ValueError(
            f"{option}: expected {count}, one for each row of {embeddings.name}, "
            f"got shape {list(values.shape)}"
        )
    if pd.isna(values).any():
        raise ValueError(f"{option}: {int(pd.isna(values).sum())} of {count} are missing")
    names = dict(names or {})
    numbers = [names.setdefault(value, len(names)) for value in values.tolist()]
    return torch.tensor(numbers), names


def read_ranking(path: Path, labels: Path, query_labels: Path | None) -> RankingTable:
    """Read a ranking and the labels to score it by.

    Where the queries are gallery images, the gallery is renumbered so that they come first, which
    is how PML wants it, and each query's own row is taken out of its answer.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a column is missing, an id unlabelled or listed twice, or an answer shorter
            than its query's R.
    """
    table = _read_table(path)
    for name in ("query", "id"):
        _column(table, name, path)
    for order, ascending in (("rank", True), ("score", False)):
        if order in table:
            _check_numbers(table[order], path)
            table = table.sort_values(order, ascending=ascending, kind="stable")
            break
    gallery = read_label_table(labels)
    same = query_labels is None
    if same:
        table = table[table["query"] != table["id"]]
    label_of_query = gallery if query_labels is None else read_label_table(query_labels)
    queries = sorted(set(table["query"].tolist()), key=str)
    _check_known("queries", queries, label_of_query, path, query_labels or labels)
    _check_known("ids", table["id"].tolist(), gallery, path, labels)
    if not queries:
        raise ValueError(f"ranking: {path.name} has no answers")
    twice = table[table.duplicated(["query", "id"])]
    if len(twice):
        query, identity = (twice[name].tolist()[0] for name in ("query", "id"))
        raise ValueError(f"ranking: the answer of query {query!r} lists id {identity!r} twice")
    asked = set(queries)
    ids = [*queries, *(identity for identity in gallery if identity not in asked)]
    ids = ids if same else list(gallery)
    place = {identity: row for row, identity in enumerate(ids)}
    names: dict[Any, int] = {}
    gallery_numbers = torch.tensor([names.setdefault(gallery[i], len(names)) for i in ids])
    query_numbers = torch.tensor(
        [names.setdefault(label_of_query[query], len(names)) for query in queries]
    )
    relevant = relevant_counts(query_numbers, gallery_numbers, gallery_includes_query=same)
    answers = {
        query: [place[identity] for identity in part["id"].tolist()]
        for query, part in table.groupby("query", sort=False)
    }
    deepest = max(1, int(relevant.max()))
    for query, wanted in zip(queries, relevant.tolist(), strict=True):
        if len(answers[query]) < wanted:
            raise ValueError(
                f"ranking: the answer of query {query!r} has {len(answers[query])} ids, but "
                f"R = {wanted} gallery images are of its class; RP and MAP@R need R places"
            )
    # Places beyond a query's own R are never looked at, so a short answer repeats its last id.
    rows = torch.tensor(
        [(answers[q] + [answers[q][-1]] * deepest)[:deepest] for q in queries], dtype=torch.int64
    )
    scores = -torch.arange(deepest, dtype=torch.float32).expand(rows.shape)
    return RankingTable(Ranking(rows, scores), tuple(queries), query_numbers, gallery_numbers, same)


def read_label_table(path: Path) -> dict[Any, Any]:
    """Label of each id of a table with both columns."""
    table = _read_table(path)
    ids, labels = (_column(table, name, path) for name in ("id", "label"))
    if pd.isna(labels).any():
        raise ValueError(f"labels: {int(pd.isna(labels).sum())} ids of {path.name} have no label")
    label_of = dict(zip(ids.tolist(), labels.tolist(), strict=True))
    if len(label_of) < len(ids):
        raise ValueError(f"labels: {len(ids) - len(label_of)} ids of {path.name} are listed twice")
    return label_of


def _check_known(
    what: str, wanted: list[Any], known: dict[Any, Any], path: Path, labels: Path
) -> None:
    unknown = list(dict.fromkeys(identity for identity in wanted if identity not in known))
    if not unknown:
        return
    hint = ""
    if str(unknown[0]) in {str(identity) for identity in known}:
        hint = "; one file has ids as numbers, the other as text"
    raise ValueError(
        f"ranking: {len(unknown)} {what} of {path.name} have no label in {labels.name}, "
        f"the first is {unknown[0]!r}{hint}"
    )


def _check_numbers(values: pd.Series[Any], path: Path) -> None:
    """Text sorts 10 before 9, and what is missing would end up last without a word."""
    if not pd.api.types.is_numeric_dtype(values) or bool(values.isna().any()):
        raise ValueError(f"{path.name}: expected a number in every row of column {values.name!r}")


def _column(table: pd.DataFrame, name: str, path: Path) -> np.ndarray:
    if name not in table:
        raise ValueError(
            f"{path.name}: expected a column {name!r}, got {', '.join(map(str, table.columns))}"
        )
    return table[name].to_numpy()


def _matrix_of(table: pd.DataFrame, path: Path) -> np.ndarray:
    if "embedding" in table:
        try:
            rows = [np.asarray(row, dtype=np.float32) for row in table["embedding"]]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"embeddings: expected a flat list of numbers in every row of column 'embedding' "
                f"of {path.name} ({error})"
            ) from error
        sizes = {row.shape for row in rows}
        if len(sizes) > 1:
            raise ValueError(
                f"embeddings: expected lists of one size in column 'embedding' of {path.name}, "
                f"got {', '.join(str(list(size)) for size in sorted(sizes)[:5])}"
            )
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)
    text = [str(c) for c in table if not pd.api.types.is_numeric_dtype(table[c])]
    if text:
        raise ValueError(
            f"embeddings: columns {', '.join(text[:5])} of {path.name} are not numbers; keep the "
            "numeric columns, or one list column 'embedding'"
        )
    return table.to_numpy(dtype=np.float32)


def _read_npy(path: Path) -> np.ndarray:
    array = read_arrays(path)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path.name}: an archive of arrays (.npz), expected a single .npy array")
    return array


def _read_table(path: Path) -> pd.DataFrame:
    return read_table(path, ("id", "query", "path", "label"))
