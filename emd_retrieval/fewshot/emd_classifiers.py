"""Classifiers by the Earth Mover's Distance: nearest, fusion, merge, prototype, the SFC layer.

At one shot the first four are one and the same: DeepEMD's 1-shot classifier.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emd_retrieval._checks import check_positive
from emd_retrieval.fewshot.classifier import TEMPERATURE, EpisodeClassifier
from emd_retrieval.fewshot.fine_tuning import FineTuning, fine_tune, support_labels
from emd_retrieval.fewshot.similarity import Sets, episode_similarity, prepare_sets
from emd_retrieval.matching import EMDMatcher

SFC_PAPER = FineTuning(learning_rate=100.0, batch_size=5, steps=100)
"""Section 5.1: 100 steps of 5 images. The learning rate, on which the paper is silent, is that of
the reference code's evaluation script."""

SFC_REFERENCE = FineTuning(learning_rate=0.1, batch_size=4, passes=100)
"""The reference code's defaults: 100 passes over the support set in batches of 4."""

SFC_REFERENCE_EVALUATION = FineTuning(learning_rate=100.0, batch_size=4, passes=100)
"""The reference code's evaluation script: as its defaults, with a learning rate of 100."""


class EMDClassifier(EpisodeClassifier[Sets]):
    """What the classifiers by EMD share: a matcher and a temperature.

    Args:
        matcher: Ground cost, node weights, coupling and solver; the default is the paper's metric.
        temperature: Logits are similarities in [-1, 1] times this.
    """

    def __init__(
        self, matcher: EMDMatcher | None = None, *, temperature: float = TEMPERATURE
    ) -> None:
        check_positive("temperature", temperature)
        self.matcher = EMDMatcher() if matcher is None else matcher
        self.temperature = temperature

    def prepare(self, nodes: Tensor) -> Sets:
        """Unit nodes, norms and means. Shape: ``[..., N, D]``."""
        return prepare_sets(self.matcher, nodes)

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {
            "classifier": type(self).__name__,
            "temperature": self.temperature,
            "matcher": self.matcher.describe(),
        }

    def _to_sets(self, nodes: Tensor, query: Sets) -> Tensor:
        """Logits against one support set a class. Shape: ``[E, way, M, D]`` to ``[E, Q, way]``."""
        return self._logits(query, self.prepare(nodes))

    def _to_images(self, support: Sets, query: Sets) -> Tensor:
        """Logits against every support image. Shape: ``[E, Q, way, shot]``."""
        _, way, shot = support.shape
        logits = self._logits(query, support.of_episode())
        return logits.view(*logits.shape[:2], way, shot)

    def _logits(self, query: Sets, support: Sets) -> Tensor:
        """Shape: ``[E, Q, N, D], [E, S, M, D] -> [E, Q, S]``."""
        logits: Tensor = episode_similarity(self.matcher, query, support) * self.temperature
        return logits


class EMDNearest(EMDClassifier):
    """EMD + NN: the class of the nearest support image (Figure 5); at one shot, DeepEMD."""

    def logits(self, support: Sets, query: Sets) -> Tensor:
        """The nearest image of each class. Shape: ``[E, Q, way]``."""
        return self._to_images(support, query).amax(dim=3)


class EMDFusion(EMDClassifier):
    """EMD + Fusion: the class whose support images are nearest on average (Figure 5)."""

    def logits(self, support: Sets, query: Sets) -> Tensor:
        """The average over the images of each class. Shape: ``[E, Q, way]``."""
        return self._to_images(support, query).mean(dim=3)


class EMDMerge(EMDClassifier):
    """EMD + Merge: all nodes of a class's support images are one big set (Figure 5)."""

    def logits(self, support: Sets, query: Sets) -> Tensor:
        """Sets of ``shot * N`` nodes. Shape: ``[E, Q, way]``."""
        return self._to_sets(support.nodes.flatten(2, 3), query)


class EMDPrototype(EMDClassifier):
    """EMD to each class's average set, node by node: prototype learning, and where the SFC starts.

    Nodes at the same place are averaged, which has a meaning for feature maps and grids, not for
    random patches.
    """

    def logits(self, support: Sets, query: Sets) -> Tensor:
        """One average set a class. Shape: ``[E, Q, way]``."""
        return self._to_sets(support.nodes.mean(dim=2), query)


class StructuredFC(EMDClassifier):
    """EMD + SFC: one set a class learned from the support images (Section 4.5, Algorithm 1).

    It starts from each class's average set. Features and matcher are fixed; gradients reach the
    learned sets through costs and, unless the matcher detaches them, weights.

    Args:
        matcher: See :class:`EMDClassifier`.
        temperature: See :class:`EMDClassifier`.
        fine_tuning: Steps, batches and rates: :data:`SFC_PAPER`, :data:`SFC_REFERENCE`,
            :data:`SFC_REFERENCE_EVALUATION` or your own.
    """

    def __init__(
        self,
        matcher: EMDMatcher | None = None,
        *,
        temperature: float = TEMPERATURE,
        fine_tuning: FineTuning = SFC_PAPER,
    ) -> None:
        super().__init__(matcher, temperature=temperature)
        self.fine_tuning = fine_tuning

    def learn(self, support: Sets) -> Tensor:
        """The learned sets of prepared support images ``[E, way, shot]``.

        Returns:
            One set a class. Shape: ``[E, way, N, D]``.
        """
        start = support.nodes.mean(dim=2)

        def logits(layer: list[Tensor], places: Tensor) -> Tensor:
            return self._to_sets(layer[0], support.of_episode(places))

        labels = support_labels(support.shape[1], support.shape[2], start.device)
        (layer,) = fine_tune(self.fine_tuning, [start], logits, labels)
        return layer

    def logits(self, support: Sets, query: Sets) -> Tensor:
        """Learned sets, then EMD. Shape: ``[E, Q, way]``."""
        return self._to_sets(self.learn(support), query)

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {**super().describe(), "fine_tuning": self.fine_tuning.describe()}
