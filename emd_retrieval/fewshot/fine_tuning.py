"""Learning a classifier's weights from the support set, for many episodes at once.

All episodes are one parameter and one SGD step: their gradients do not meet, so each learns as it
would alone. What is learned (a structured FC layer, a plain one) is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emd_retrieval._checks import check_positive


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How weights are learned from the support set: SGD on the cross-entropy.

    One schedule of places in the support set serves every episode. An episode's images lie in
    random order already, so nothing is lost, and results do not depend on how episodes are batched.

    Attributes:
        learning_rate: Of SGD.
        momentum: Of SGD.
        dampening: Of SGD.
        weight_decay: Of SGD.
        batch_size: Support images a step; smaller support sets are one batch.
        steps: Steps in all; ``None`` where ``passes`` tells.
        passes: Passes over the support set, as the reference code counts; its last batch of a pass
            may be smaller. ``None`` where ``steps`` tells.
        seed: Of the schedule.
    """

    learning_rate: float
    momentum: float = 0.9
    dampening: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 5
    steps: int | None = None
    passes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_positive("batch_size", self.batch_size)
        for name in ("momentum", "dampening", "weight_decay"):
            check_positive(name, getattr(self, name), allow_zero=True)
        length = self.steps if self.passes is None else self.passes
        if (self.steps is None) == (self.passes is None) or length is None or length < 0:
            raise ValueError(
                "steps, passes: expected one of the two as a number of zero or more, "
                f"got {self.steps} and {self.passes}"
            )

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return asdict(self)

    def schedule(self, size: int) -> Iterator[Tensor]:
        """Places in a support set of ``size`` images, one tensor a step."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.passes is not None:
            for _ in range(self.passes):
                yield from torch.randperm(size, generator=generator).split(self.batch_size)
            return
        for _ in range(self.steps or 0):
            yield torch.randperm(size, generator=generator)[: self.batch_size]


def fine_tune(
    settings: FineTuning,
    start: list[Tensor],
    logits: Callable[[list[Tensor], Tensor], Tensor],
    labels: Tensor,
) -> list[Tensor]:
    """Minimise the cross-entropy over the support sets of all episodes.

    Args:
        settings: See :class:`FineTuning`.
        start: First values of the weights. Shapes: ``[E, ...]``.
        logits: From weights and places in the support set to logits ``[E, places, way]``.
        labels: Class of each place of the support set, the same in every episode. Shape: ``[S]``.

    Returns:
        The learned weights, detached.
    """
    with torch.enable_grad():
        weights = [part.detach().clone().requires_grad_() for part in start]
        optimizer = torch.optim.SGD(
            weights,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            dampening=settings.dampening,
            weight_decay=settings.weight_decay,
        )
        for places in settings.schedule(len(labels)):
            places = places.to(labels.device)
            out = logits(weights, places)
            target = labels[places].expand(out.shape[:2])
            # The mean over a batch, the sum over episodes: each one's own loss.
            loss = F.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="sum")
            loss = loss / len(places)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [part.detach() for part in weights]


def support_labels(way: int, shot: int, device: torch.device) -> Tensor:
    """Class of each support image, flattened class by class. Shape: ``[way * shot]``."""
    return torch.arange(way, device=device).repeat_interleave(shot)
