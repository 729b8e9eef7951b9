"""The paper's baselines: classifiers by global vectors, and by local features without transport.

Global vectors are the mean of an image's nodes: for the cells of a feature map, its pooled feature.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emd_retrieval._checks import check_choice, check_positive
from emd_retrieval.fewshot.classifier import TEMPERATURE, EpisodeClassifier, TensorBank
from emd_retrieval.fewshot.fine_tuning import FineTuning, fine_tune, support_labels

FC_FINE_TUNING = FineTuning(learning_rate=0.01, weight_decay=1e-3, batch_size=4, passes=100)
"""How "A Closer Look at Few-shot Classification" (the paper's [28]) trains its FC classifiers."""


class _Baseline(EpisodeClassifier[TensorBank]):
    """Names and settings of the baselines."""

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        settings = {
            name: value.describe() if isinstance(value, FineTuning) else value
            for name, value in vars(self).items()
        }
        return {"classifier": type(self).__name__, **settings}


class _GlobalBaseline(_Baseline):
    """Images as the mean of their nodes."""

    def prepare(self, nodes: Tensor) -> TensorBank:
        """Global vectors. Shape: ``[..., N, D]`` to ``[..., D]``."""
        return TensorBank(nodes.mean(dim=-2))

    def logits(self, support: TensorBank, query: TensorBank) -> Tensor:
        """See :meth:`_classify`. Shape: ``[E, Q, way]``."""
        return self._classify(support.value, query.value)

    @abstractmethod
    def _classify(self, support: Tensor, query: Tensor) -> Tensor:
        """Shape: ``[E, way, shot, D], [E, Q, D] -> [E, Q, way]``."""


class ProtoNet(_GlobalBaseline):
    """Prototypical network: squared Euclidean distance to each class's mean vector (Table 1).

    Args:
        temperature: Logits are minus the squared distances times this.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        check_positive("temperature", temperature)
        self.temperature = temperature

    def _classify(self, support: Tensor, query: Tensor) -> Tensor:
        prototypes = support.mean(dim=2)
        # |q - p|^2 without |q|^2, which is the same for every class.
        products = 2 * query @ prototypes.mT - prototypes.square().sum(dim=-1).unsqueeze(1)
        return self.temperature * (products - query.square().sum(dim=-1, keepdim=True))


class MatchingNet(_GlobalBaseline):
    """Matching network: attention by cosine over the support images, added up a class (Table 1).

    Args:
        temperature: The attention is the softmax of the cosines times this.
    """

    def __init__(self, *, temperature: float = TEMPERATURE) -> None:
        check_positive("temperature", temperature)
        self.temperature = temperature

    def _classify(self, support: Tensor, query: Tensor) -> Tensor:
        cosines = F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).flatten(1, 2).mT
        # The logarithm of the attention a class gets, so that its softmax is that attention.
        attention = (cosines * self.temperature).unflatten(2, support.shape[1:3])
        return torch.logsumexp(attention, dim=3)


class FullyConnected(_GlobalBaseline):
    """An FC classifier learned from the support images (Table 1, "FC"; Figure 5, cosine).

    Args:
        metric: ``"dot"``: linear layer with bias; ``"cosine"``: cosine to a weight vector a class.
        temperature: Factor of the cosines; the dot product takes none.
        start: First weights: ``"random"`` (seeded, the same for every episode, as a new layer's) or
            ``"mean"``, each class's mean vector.
        fine_tuning: Steps, batches and rates.
    """

    def __init__(
        self,
        metric: str = "dot",
        *,
        temperature: float = TEMPERATURE,
        start: str = "random",
        fine_tuning: FineTuning = FC_FINE_TUNING,
    ) -> None:
        check_choice("metric", metric, ["dot", "cosine"])
        check_choice("start", start, ["random", "mean"])
        check_positive("temperature", temperature)
        self.metric = metric
        self.temperature = temperature
        self.start = start
        self.fine_tuning = fine_tuning

    def _classify(self, support: Tensor, query: Tensor) -> Tensor:
        episodes, way, shot, channels = support.shape
        images = support.detach().flatten(1, 2)
        if self.start == "mean":
            weight = support.mean(dim=2)
        else:
            generator = torch.Generator().manual_seed(self.fine_tuning.seed)
            bound = channels**-0.5
            draws = torch.rand(way, channels, generator=generator, dtype=torch.float64)
            weight = ((2 * draws - 1) * bound).to(support).expand(episodes, -1, -1)
        learned = fine_tune(
            self.fine_tuning,
            [weight, support.new_zeros(episodes, 1, way)][: 2 if self.metric == "dot" else 1],
            lambda layer, places: self._layer(layer, images[:, places]),
            support_labels(way, shot, support.device),
        )
        return self._layer(learned, query)

    def _layer(self, weights: list[Tensor], vectors: Tensor) -> Tensor:
        if self.metric == "dot":
            weight, bias = weights
            return vectors @ weight.mT + bias
        cosines = F.normalize(vectors, dim=-1) @ F.normalize(weights[0], dim=-1).mT
        return self.temperature * cosines


class _LocalBaseline(_Baseline):
    """Images as their unit nodes."""

    def prepare(self, nodes: Tensor) -> TensorBank:
        """Unit nodes. Shape: ``[..., N, D]``."""
        return TensorBank(F.normalize(nodes, dim=-1), image_dims=2)


class LocalKNN(_LocalBaseline):
    """Each query node's nearest support nodes of a class, cosines averaged (Table 1, "KNN"; DN4).

    Args:
        neighbors: Nearest nodes that count, k; a class with fewer nodes counts all.
        temperature: Factor of the average cosine.
    """

    def __init__(self, *, neighbors: int = 3, temperature: float = TEMPERATURE) -> None:
        check_positive("neighbors", neighbors)
        check_positive("temperature", temperature)
        self.neighbors = neighbors
        self.temperature = temperature

    def logits(self, support: TensorBank, query: TensorBank) -> Tensor:
        """Mean of the k best cosines of each query node. Shape: ``[E, Q, way]``."""
        unit, nodes = query.value, support.value.flatten(2, 3)
        (episodes, queries, n, _), (way, pool) = unit.shape, nodes.shape[1:3]
        cosines = unit.flatten(1, 2) @ nodes.flatten(1, 2).mT
        cosines = cosines.view(episodes, queries, n, way, pool)
        best = cosines.topk(min(self.neighbors, pool), dim=4, sorted=False).values
        return self.temperature * best.mean(dim=(2, 4))


class PredictionFusion(_LocalBaseline):
    """Each query node predicts a class by itself; the probabilities are averaged (Table 1).

    A node is compared by cosine with each class's mean vector, as in dense classification.

    Args:
        temperature: A node's probabilities are the softmax of its cosines times this.
    """

    def __init__(self, *, temperature: float = TEMPERATURE) -> None:
        check_positive("temperature", temperature)
        self.temperature = temperature

    def logits(self, support: TensorBank, query: TensorBank) -> Tensor:
        """Logarithms of the averaged probabilities. Shape: ``[E, Q, way]``."""
        unit = query.value
        prototypes = F.normalize(support.value.mean(dim=(2, 3)), dim=-1)
        cosines = unit.flatten(1, 2) @ prototypes.mT
        votes = (cosines * self.temperature).log_softmax(dim=2).unflatten(1, unit.shape[1:3])
        return torch.logsumexp(votes, dim=2) - math.log(unit.shape[2])
