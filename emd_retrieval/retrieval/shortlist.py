"""First stage: the nearest global vectors, by cosine, from a FAISS index."""

from __future__ import annotations

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emd_retrieval._checks import check_finite, check_tensor
from emd_retrieval.retrieval.ranking import Ranking


class FaissShortlist:
    """Exact cosine search over global vectors: a flat inner-product index on unit vectors.

    Args:
        vectors: Global vectors of the gallery; normalised here. Shape: ``[R, G]``.

    Raises:
        TypeError: If ``vectors`` is not a floating-point tensor.
        ValueError: If it is empty, not 2-D, or not finite.

    Example:
        >>> shortlist = FaissShortlist(torch.eye(3))
        >>> shortlist.search(torch.tensor([[0.1, 0.9, 0.2]]), 2).rows
        tensor([[1, 2]])
    """

    def __init__(self, vectors: Tensor) -> None:
        sizes = check_tensor("vectors", vectors, ["R", "G"])
        if 0 in sizes.values():
            raise ValueError(f"vectors: expected at least one vector, got {list(vectors.shape)}")
        check_finite("vectors", vectors)
        self.size, self.channels = sizes["R"], sizes["G"]
        self._index = faiss.IndexFlatIP(self.channels)
        self._index.add(_unit(vectors))

    def search(self, queries: Tensor, k: int, *, exclude: Tensor | None = None) -> Ranking:
        """The ``k`` nearest gallery rows of each query, best first.

        Args:
            queries: Shape: ``[Q, G]``.
            k: How many; at most R, less one with ``exclude``.
            exclude: A gallery row to leave out for each query, usually itself. Shape: ``[Q]``.

        Raises:
            TypeError: If ``queries`` is not a floating-point tensor.
            ValueError: If the shape or ``k`` does not fit, or a value is not finite.
        """
        check_tensor("queries", queries, ["Q", self.channels])
        check_finite("queries", queries)
        spare = int(exclude is not None)
        if not 1 <= k <= self.size - spare:
            raise ValueError(f"k: expected 1 to {self.size - spare} (the gallery), got {k}")
        scores, rows = (torch.from_numpy(a) for a in self._index.search(_unit(queries), k + spare))
        if exclude is not None:
            rows, scores = _without(rows, scores, exclude)
        return Ranking(rows, scores)


def _unit(vectors: Tensor) -> np.ndarray:
    unit: np.ndarray = F.normalize(vectors.detach().float(), dim=1).cpu().contiguous().numpy()
    return unit


def _without(rows: Tensor, scores: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
    """Drop one row a query; where duplicates crowded it out, the last one goes instead."""
    drop = rows == exclude.to(rows).unsqueeze(1)
    drop[~drop.any(dim=1), -1] = True
    keep = ~drop
    shape = (len(rows), rows.shape[1] - 1)
    return rows[keep].view(shape), scores[keep].view(shape)
