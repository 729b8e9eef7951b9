"""What every few-shot classifier is: support and query features in, class logits out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from emd_retrieval._checks import check_tensor

TEMPERATURE = 12.5
"""Logits are similarities times this (the reference code's; its ``12.5 / n`` divides the mass)."""


class Bank(Protocol):
    """What a classifier computed once of each image, with any leading dimensions."""

    @property
    def image_bytes(self) -> int:
        """Bytes that one image takes when rows are picked."""
        ...

    def at(self, rows: Tensor) -> Self:
        """The images at some rows; ``rows`` of any shape becomes the leading dimensions."""
        ...


BankT = TypeVar("BankT", bound=Bank)


@dataclass(frozen=True, slots=True)
class TensorBank:
    """A bank that is one tensor: a vector or a set of nodes for each image.

    Attributes:
        value: Shape: ``[..., D]``, or ``[..., N, D]`` with ``image_dims`` 2.
        image_dims: Trailing dimensions that are of one image.
    """

    value: Tensor
    image_dims: int = 1

    @property
    def image_bytes(self) -> int:
        """Bytes that one image takes when rows are picked."""
        return math.prod(self.value.shape[-self.image_dims :]) * self.value.element_size()

    def at(self, rows: Tensor) -> TensorBank:
        """The images at some rows; ``rows`` of any shape becomes the leading dimensions."""
        return replace(self, value=self.value[rows])


class EpisodeClassifier(ABC, Generic[BankT]):
    """Classifies the queries of episodes from a few support images a class.

    A subclass says what is computed of each image alone (:meth:`prepare`: images recur over
    episodes, so an evaluation does it once an image) and how episodes of prepared images become
    logits (:meth:`logits`). Called with features it does both.

    Example:
        >>> import torch
        >>> from emd_retrieval.fewshot import EMDNearest
        >>> features = torch.rand(2, 5, 1, 25, 64), torch.rand(2, 75, 25, 64)
        >>> EMDNearest()(*features).shape
        torch.Size([2, 75, 5])
    """

    @abstractmethod
    def prepare(self, nodes: Tensor) -> BankT:
        """What is of each image alone. Shape: ``[..., N, D]``."""

    @abstractmethod
    def logits(self, support: BankT, query: BankT) -> Tensor:
        """Logits of prepared episodes.

        Shape:
            Support ``[E, way, shot, ...]`` and query ``[E, Q, ...]`` to ``[E, Q, way]``.
        """

    def __call__(self, support: Tensor, query: Tensor) -> Tensor:
        """Logits of episodes.

        Args:
            support: Local features of the support images. Shape: ``[E, way, shot, N, D]``.
            query: Local features of the queries. Shape: ``[E, Q, N, D]``.

        Returns:
            Logits, differentiable where the classifier is. Shape: ``[E, Q, way]``.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If the shapes do not fit, or there is nothing to learn from.
        """
        sizes = check_tensor("support", support, ["E", "way", "shot", "N", "D"])
        check_tensor(
            "query", query, ["E", "Q", "N", "D"], sizes={k: sizes[k] for k in ("E", "N", "D")}
        )
        if 0 in support.shape or 0 in query.shape:
            raise ValueError(
                "support, query: expected at least one image, node and channel, "
                f"got {list(support.shape)} and {list(query.shape)}"
            )
        return self.logits(self.prepare(support), self.prepare(query))

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
