"""Episodes: which images are support and which are queries, N-way K-shot, drawn for many at once.

Episodes are rows of a collection and nothing else; features and classifiers meet them elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_tensor

# Random numbers are drawn in blocks of this many episodes, whatever number is asked for: the first
# 600 of 5,000 episodes are the 600 of the same seed.
_BLOCK = 64


@dataclass(frozen=True)
class Episodes:
    """Episodes as rows of one collection.

    Attributes:
        classes: Label of each class in the collection. Shape: ``[E, way]``, int64.
        support: Rows of the support images. Shape: ``[E, way, shot]``, int64.
        query: Rows of the query images. Shape: ``[E, way, queries]``, int64.
    """

    classes: Tensor
    support: Tensor
    query: Tensor

    def __post_init__(self) -> None:
        sizes = check_tensor("classes", self.classes, ["E", "way"], floating=False)
        for name, rows in (("support", self.support), ("query", self.query)):
            check_tensor(name, rows, ["E", "way", name], sizes=sizes, floating=False)

    def __len__(self) -> int:
        return len(self.support)

    @property
    def way(self) -> int:
        """Classes an episode."""
        return self.support.shape[1]

    @property
    def shot(self) -> int:
        """Support images a class."""
        return self.support.shape[2]

    @property
    def queries(self) -> int:
        """Query images a class."""
        return self.query.shape[2]

    @property
    def query_labels(self) -> Tensor:
        """Place of the right class for each query of :attr:`query`, flattened class by class.

        Shape:
            ``[way * queries]``, the same in every episode.
        """
        return torch.arange(self.way).repeat_interleave(self.queries)

    def at(self, rows: Tensor | slice | Sequence[int]) -> Episodes:
        """Some of the episodes."""
        return Episodes(self.classes[rows], self.support[rows], self.query[rows])


def draw_episodes(
    labels: Tensor | NDArray[np.int64],
    *,
    way: int = 5,
    shot: int = 1,
    queries: int = 15,
    count: int,
    seed: int = 0,
) -> Episodes:
    """Draw episodes: classes without replacement, then images of each without replacement.

    The draw depends on the labels, the numbers and the seed alone, and ``count`` episodes are the
    beginning of any larger number of the same seed.

    Args:
        labels: Class of each image. Shape: ``[n]``.
        way: Classes an episode.
        shot: Support images a class.
        queries: Query images a class (the reference code's 15; the paper trains with 16).
        count: Number of episodes, E.
        seed: Seed of the draw.

    Raises:
        TypeError: If ``labels`` are not integers.
        ValueError: If a number is below 1, there are fewer classes than ``way``, or a class has
            fewer than ``shot + queries`` images.

    Example:
        >>> episodes = draw_episodes(torch.arange(6).repeat(20), shot=1, queries=15, count=3)
        >>> episodes.support.shape, episodes.query.shape
        (torch.Size([3, 5, 1]), torch.Size([3, 5, 15]))
    """
    for name, value in (("way", way), ("shot", shot), ("queries", queries), ("count", count)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    found = labels if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    check_tensor("labels", found, ["n"], floating=False)
    if found.is_floating_point():
        raise TypeError(f"labels: expected integers, got dtype {found.dtype}")
    names, sizes = found.unique(return_counts=True)
    _check_enough(names, sizes, way, shot, queries)
    # One row a class, its images in the order of the collection.
    members = torch.zeros(len(names), int(sizes.max()), dtype=torch.int64)
    present = torch.arange(members.shape[1]) < sizes[:, None]
    members[present] = found.argsort(stable=True)

    generator = torch.Generator().manual_seed(seed)
    classes, images = [], []
    for _ in range(0, count, _BLOCK):
        ranks = torch.rand(_BLOCK, len(names), generator=generator)
        chosen = ranks.argsort(dim=1)[:, :way]
        keys = torch.rand(_BLOCK, way, members.shape[1], generator=generator)
        keys = keys.masked_fill(~present[chosen], -1.0)
        places = keys.topk(shot + queries, dim=2).indices
        classes.append(names[chosen])
        images.append(members[chosen].gather(2, places))
    drawn = torch.cat(images)[:count]
    return Episodes(torch.cat(classes)[:count], drawn[:, :, :shot], drawn[:, :, shot:])


def _check_enough(names: Tensor, sizes: Tensor, way: int, shot: int, queries: int) -> None:
    if len(names) < way:
        raise ValueError(
            f"way: expected at most {len(names)}, the classes of the collection, got {way}"
        )
    needed = shot + queries
    small = sizes < needed
    if bool(small.any()):
        shown = ", ".join(
            f"class {int(name)} with {int(size)}"
            for name, size in zip(names[small][:3], sizes[small][:3], strict=True)
        )
        more = f" and {int(small.sum()) - 3} more classes" if int(small.sum()) > 3 else ""
        raise ValueError(
            f"labels: expected at least {needed} images in every class ({shot} shots + {queries} "
            f"queries); too small: {shown}{more}. Lower shot or queries, or leave the class out"
        )
