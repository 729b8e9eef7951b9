"""A ranking: for each query, gallery rows best first, with their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emd_retrieval._checks import check_tensor


@dataclass(frozen=True)
class Ranking:
    """Gallery rows for each query, best first.

    Attributes:
        rows: Rows of the gallery. Shape: ``[Q, K]``, int64.
        scores: Similarities, larger is better; ``-inf`` for rows that keep the first stage's order
            because they were not compared. Shape: ``[Q, K]``, floating point.
    """

    rows: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        sizes = check_tensor("rows", self.rows, ["Q", "K"], floating=False)
        check_tensor("scores", self.scores, ["Q", "K"], sizes=sizes)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def depth(self) -> int:
        """K, how many rows each query has."""
        return int(self.rows.shape[1])

    def top(self, k: int) -> Ranking:
        """The first ``k`` rows of every query."""
        return Ranking(self.rows[:, :k], self.scores[:, :k])

    def reordered(self, scores: Tensor) -> Ranking:
        """Put the head in the order of new scores and leave the tail as it is.

        Args:
            scores: New scores of the first C rows; ties keep the present order. Shape: ``[Q, C]``.

        Returns:
            A ranking of the same depth; the tail's scores are ``-inf``, since nothing compares them
            with the head's.

        Example:
            >>> first = Ranking(torch.tensor([[7, 8, 9]]), torch.tensor([[0.9, 0.8, 0.7]]))
            >>> first.reordered(torch.tensor([[0.1, 0.6]])).rows
            tensor([[8, 7, 9]])
        """
        count = check_tensor("scores", scores, [len(self), "C"])["C"]
        if count > self.depth:
            raise ValueError(f"scores: expected at most {self.depth} a query, got {count}")
        order = scores.argsort(dim=1, descending=True, stable=True)
        tail = self.rows[:, count:]
        return Ranking(
            torch.cat([self.rows[:, :count].gather(1, order), tail], dim=1),
            torch.cat([scores.gather(1, order), scores.new_full(tail.shape, float("-inf"))], dim=1),
        )


def rank_by(scores: Tensor, k: int, *, exclude: Tensor | None = None) -> Ranking:
    """Rank a full score matrix; equal scores are ranked by row, so the order is reproducible.

    Args:
        scores: Similarities. Shape: ``[Q, R]``.
        k: Depth; at most R, less one with ``exclude``.
        exclude: A gallery row to leave out for each query, usually itself. Shape: ``[Q]``.

    Raises:
        ValueError: If the shape or ``k`` does not fit.
    """
    check_tensor("scores", scores, ["Q", "R"])
    queries, size = scores.shape
    most = size - (exclude is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 to {most}, got {k}")
    if exclude is not None:
        scores = scores.clone()
        scores[torch.arange(queries), exclude] = float("-inf")
    values, rows = scores.sort(dim=1, descending=True, stable=True)
    return Ranking(rows[:, :k], values[:, :k])
