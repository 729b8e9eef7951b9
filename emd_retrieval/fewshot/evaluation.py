"""Accuracy over many episodes from cached features: each one's own, mean and 95 % interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emd_retrieval._checks import check_positive, check_tensor
from emd_retrieval.fewshot.classifier import BankT, EpisodeClassifier
from emd_retrieval.fewshot.episodes import Episodes
from emd_retrieval.progress import progress_counter


@dataclass(frozen=True)
class EpisodeScores:
    """Accuracies of one classifier over episodes.

    Attributes:
        accuracies: Share of right queries of each episode. Shape: ``[E]``, float64.
    """

    accuracies: Tensor

    @property
    def mean(self) -> float:
        """Mean accuracy, in [0, 1]."""
        return float(self.accuracies.mean())

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval of the mean, ``1.96 s / sqrt(n)``; NaN for one."""
        spread = float(self.accuracies.std()) if len(self.accuracies) > 1 else math.nan
        return 1.96 * spread / math.sqrt(len(self.accuracies))

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.interval:.2f}"


def evaluate_episodes(
    classifier: EpisodeClassifier[BankT],
    nodes: Tensor,
    episodes: Episodes,
    *,
    bank: BankT | None = None,
    memory_mb: float = 32.0,
    description: str | None = None,
) -> EpisodeScores:
    """Classify the queries of every episode.

    Each image is prepared once, however many episodes it is in. Another data set's features, for a
    test across domains, are no different from these.

    Args:
        classifier: Any classifier of this room.
        nodes: Local features of the whole collection. Shape: ``[n, N, D]``.
        episodes: Rows of ``nodes``.
        bank: What the classifier prepared of ``nodes``, for several evaluations of one; prepared
            here by default.
        memory_mb: Rough bound on the prepared images that are worked on at once, in MiB.
            Blocks above 32 MiB are fetched from the system anew each time, which is slow.
        description: Shows a progress bar under this name.

    Raises:
        TypeError: If ``nodes`` is not a floating-point tensor.
        ValueError: If the shape does not fit, an episode has rows that ``nodes`` has not, or the
            features are not finite.

    Example:
        >>> from emd_retrieval.fewshot import ProtoNet, draw_episodes
        >>> labels = torch.arange(5).repeat(20)
        >>> nodes = torch.nn.functional.one_hot(labels).float().unsqueeze(1)
        >>> episodes = draw_episodes(labels, count=8)
        >>> print(evaluate_episodes(ProtoNet(), nodes, episodes))
        100.00 ± 0.00
    """
    check_positive("memory_mb", memory_mb)
    sizes = check_tensor("nodes", nodes, ["n", "N", "D"], finite=True)
    _check_rows(episodes, sizes["n"])
    images = episodes.way * (episodes.shot + episodes.queries)
    target = episodes.query_labels.to(nodes.device)
    accuracies = []
    with (
        torch.no_grad(),
        progress_counter(description, total=len(episodes), unit="episode") as bar,
    ):
        bank = classifier.prepare(nodes) if bank is None else bank
        chunk = max(1, int(memory_mb * 2**20 / (images * bank.image_bytes)))
        for start in range(0, len(episodes), chunk):
            part = episodes.at(slice(start, start + chunk))
            support = bank.at(part.support.to(nodes.device))
            query = bank.at(part.query.flatten(1).to(nodes.device))
            hits = classifier.logits(support, query).argmax(dim=2) == target
            accuracies.append(hits.double().mean(dim=1).cpu())
            bar.update(len(part))
    return EpisodeScores(torch.cat(accuracies))


def _check_rows(episodes: Episodes, images: int) -> None:
    if not len(episodes):
        raise ValueError("episodes: expected at least one, got none")
    rows = torch.cat([episodes.support.flatten(), episodes.query.flatten()])
    if not 0 <= int(rows.min()) <= int(rows.max()) < images:
        raise ValueError(
            f"episodes: expected rows of nodes, 0 to {images - 1}, "
            f"got {int(rows.min())} to {int(rows.max())}; they are of another collection"
        )
