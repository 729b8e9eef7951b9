"""Records of the matches inside an episode: what a figure of them needs, kept in one file.

The paper's Figures 6 and 7 are drawn from these elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emd_retrieval._checks import check_tensor
from emd_retrieval._files import whole_file
from emd_retrieval.fewshot.episodes import Episodes
from emd_retrieval.matching import EMDMatcher


@dataclass(frozen=True)
class EpisodeMatches:
    """Pairs of a query and a support image of one episode, each with its whole match.

    Attributes:
        query: Row of the query image in the collection. Shape: ``[P]``.
        support: Row of the support image. Shape: ``[P]``.
        same_class: Whether the two are of one class. Shape: ``[P]``, bool.
        similarity: Equation 3, the mass divided out. Shape: ``[P]``.
        query_weights: Node weights of the query; they sum to one. Shape: ``[P, N]``.
        support_weights: Node weights of the support image. Shape: ``[P, M]``.
        flow: Mass moved between nodes; sums to one. Shape: ``[P, N, M]``.
        cost: Ground cost between nodes. Shape: ``[P, N, M]``.
        query_boxes: Left, top, right, bottom of each query node, as shares of the view.
            Shape: ``[P, N, 4]``.
        support_boxes: The same of the support image. Shape: ``[P, M, 4]``.
    """

    query: Tensor
    support: Tensor
    same_class: Tensor
    similarity: Tensor
    query_weights: Tensor
    support_weights: Tensor
    flow: Tensor
    cost: Tensor
    query_boxes: Tensor
    support_boxes: Tensor

    def __len__(self) -> int:
        return len(self.query)

    def save(self, path: str | Path) -> Path:
        """Write the record as an ``.npz`` file, whole or not at all, and return its path.

        Raises:
            ValueError: If the path does not end in ``.npz``.
        """
        target = Path(path)
        if target.suffix != ".npz":
            raise ValueError(f"path: expected a name that ends in .npz, got {target.name}")
        parts = {part.name: getattr(self, part.name).cpu().numpy() for part in fields(self)}
        with whole_file(target) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **parts)
        return target

    @classmethod
    def load(cls, path: str | Path) -> EpisodeMatches:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If it is not such a file.
        """
        names = [part.name for part in fields(cls)]
        with np.load(path, allow_pickle=False) as stored:
            missing = sorted(set(names) - set(stored.files))
            if missing:
                raise ValueError(f"{path}: not a record of matches; {', '.join(missing)} missing")
            return cls(**{name: torch.from_numpy(stored[name]) for name in names})


def episode_matches(
    matcher: EMDMatcher,
    nodes: Tensor,
    episodes: Episodes,
    index: int,
    *,
    boxes: Tensor,
    queries: int = 1,
) -> EpisodeMatches:
    """Match queries of one episode with every support image of it.

    Args:
        matcher: What compares two sets.
        nodes: Local features of the whole collection. Shape: ``[n, N, D]``.
        episodes: Rows of ``nodes``.
        index: Which episode.
        boxes: Where the nodes lie, as shares of the view: of every image alike, ``[N, 4]``, or of
            each, ``[n, N, 4]``.
        queries: How many queries of each class, the first ones.

    Returns:
        ``way * queries * way * shot`` pairs, query by query.

    Raises:
        TypeError: If ``nodes`` or ``boxes`` is not a floating-point tensor.
        ValueError: If a shape does not fit, or there are not so many queries.
        IndexError: If there is no such episode.
    """
    sizes = check_tensor("nodes", nodes, ["n", "N", "D"])
    dims: list[int | str] = ["N", 4] if boxes.ndim == 2 else ["n", "N", 4]
    check_tensor("boxes", boxes, dims, sizes=sizes)
    if not 1 <= queries <= episodes.queries:
        raise ValueError(f"queries: expected 1 to {episodes.queries}, got {queries}")
    support = episodes.support[index].flatten()
    query = episodes.query[index, :, :queries].flatten()
    support_class = torch.arange(episodes.way).repeat_interleave(episodes.shot)
    query_class = torch.arange(episodes.way).repeat_interleave(queries)
    left = query.repeat_interleave(len(support))
    right = support.repeat(len(query))
    match = matcher.match(nodes[left], nodes[right])
    where = boxes.expand(len(nodes), -1, -1) if boxes.ndim == 2 else boxes
    return EpisodeMatches(
        query=left,
        support=right,
        same_class=(query_class[:, None] == support_class).flatten(),
        similarity=match.similarity,
        query_weights=match.query_weights,
        support_weights=match.reference_weights,
        flow=match.flow,
        cost=match.cost,
        query_boxes=where[left],
        support_boxes=where[right],
    )
