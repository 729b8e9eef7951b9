"""What is random in training, as pure functions of a seed and of where the run stands.

Nothing here has a state, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from emd_retrieval._checks import check_tensor


def number_of(*parts: int | str) -> int:
    """A 32-bit number that belongs to these parts.

    >>> number_of("views", 0, 7) == number_of("views", 0, 7) != number_of("views", 7, 0)
    True
    """
    # torch's CPU generator reads 32 bits of a seed.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generator_of(*parts: int | str) -> torch.Generator:
    """A generator that belongs to these parts."""
    return torch.Generator().manual_seed(number_of(*parts))


class BatchDraw:
    """Which images are in a batch: P classes of K images each, or with K = 1 plain random ones.

    Args:
        labels: Class of each image. Shape: ``[n]``, int64.
        batch_size: P times K.
        images_per_class: K; a class with fewer images gives some twice.
        seed: Of all draws.

    Raises:
        ValueError: If there are fewer than P classes.
    """

    def __init__(
        self, labels: Tensor, *, batch_size: int, images_per_class: int, seed: int
    ) -> None:
        check_tensor("labels", labels, ["n"], floating=False)
        self.members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
        self.size = len(labels)
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.seed = seed
        classes = batch_size // images_per_class if images_per_class > 1 else 2
        if len(self.members) < classes:
            raise ValueError(
                f"batch_size: {batch_size} images of {images_per_class} a class need {classes} "
                f"classes to train on, got {len(self.members)}"
            )

    def rows(self, number: int) -> Tensor:
        """The rows of a batch, by its number in the run. Shape: ``[batch_size]``."""
        if self.images_per_class == 1:
            places = torch.arange(number * self.batch_size, (number + 1) * self.batch_size)
            return torch.stack(
                [
                    _epoch(self.seed, place // self.size, self.size)[place % self.size]
                    for place in places.tolist()
                ]
            )
        generator = generator_of("batch", self.seed, number)
        chosen = torch.randperm(len(self.members), generator=generator)
        rows = []
        for place in chosen[: self.batch_size // self.images_per_class].tolist():
            members = self.members[place]
            order = torch.randperm(len(members), generator=generator)
            repeats = -(-self.images_per_class // len(members))
            rows.append(members[order.repeat(repeats)[: self.images_per_class]])
        return torch.cat(rows)

    def views(self, number: int, count: int) -> Tensor:
        """Which of ``count`` cached views each image of a batch has. Shape: ``[batch_size]``."""
        generator = generator_of("view", self.seed, number)
        return torch.randint(count, (self.batch_size,), generator=generator)


# Outside of the class: a cache in an instance could not travel to worker processes.
@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator_of("epoch", seed, epoch))


def split_classes(num_classes: int, *, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """Class-disjoint parts for training and validation.

    Args:
        num_classes: Classes to divide.
        folds: Parts; 0 holds nothing out.
        fold: The part that is held out.
        seed: Of the division.

    Returns:
        Training classes and held-out classes, ascending.

    Raises:
        ValueError: If a part would have less than one class, or training fewer than two.

    Example:
        >>> [part.tolist() for part in split_classes(6, folds=3, fold=0, seed=0)]
        [[1, 2, 3, 5], [0, 4]]
    """
    order = torch.randperm(num_classes, generator=generator_of("folds", seed))
    if folds == 0:
        return order.sort().values, order[:0]
    held_out = order[fold::folds]
    if num_classes < folds or num_classes - len(held_out) < 2:
        raise ValueError(
            f"folds: {num_classes} training classes cannot be divided into {folds} folds with two "
            f"classes left to train on; take other folds or more classes"
        )
    return order[~torch.isin(order, held_out)].sort().values, held_out.sort().values
