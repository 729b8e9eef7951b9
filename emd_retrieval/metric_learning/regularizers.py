"""Regularisers of losses over sets, in the form that pytorch-metric-learning's losses take them."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.reducers import DivisorReducer
from pytorch_metric_learning.regularizers import BaseRegularizer
from torch import Tensor

from emd_retrieval.features.packing import unpack


class CentersRegularizer(BaseRegularizer):
    """SoftTriple's pull between the centres of a class: the mean of ``sqrt(2 - 2 similarity)``.

    PML's ``SparseCentersRegularizer``, over the pairs within classes alone: of sets, all pairs of
    centres would be a hundred times the work.

    Args:
        num_classes: Classes.
        centers_per_class: Centres of each; one after the other in the weights' rows.
        distance: A similarity; the cosine by default.
    """

    def __init__(
        self, num_classes: int, centers_per_class: int, distance: BaseDistance | None = None
    ) -> None:
        super().__init__(distance=CosineSimilarity() if distance is None else distance)
        if centers_per_class < 2:
            raise ValueError(
                f"centers_per_class: expected 2 or more to regularise, got {centers_per_class}"
            )
        first, second = torch.triu_indices(centers_per_class, centers_per_class, 1)
        starts = centers_per_class * torch.arange(num_classes).unsqueeze(1)
        self.register_buffer("first", (starts + first).flatten(), persistent=False)
        self.register_buffer("second", (starts + second).flatten(), persistent=False)

    def compute_loss(self, weights: Tensor) -> dict[str, Any]:
        """As PML's losses call it. Shape: ``[num_classes * centers_per_class, width]``."""
        weights = self.distance.maybe_normalize(weights)
        first, second = self.first.to(weights.device), self.second.to(weights.device)
        similarity = self.distance.pairwise_distance(weights[first], weights[second])
        small = torch.finfo(weights.dtype).eps
        pull = (2 + small - 2 * similarity.clamp_max(1)).sqrt()
        # PML halves the mean; recipes' weights are in that scale.
        return {
            "loss": {
                "losses": pull,
                "indices": torch.arange(len(pull), device=pull.device),
                "reduction_type": "element",
                "divisor": 2 * len(pull),
            }
        }

    def get_default_reducer(self) -> DivisorReducer:
        """A sum over a divisor."""
        return DivisorReducer()


class NodeMeanRegularizer(BaseRegularizer):
    """The SNR loss's pull to zero mean: ``|sum of a node's channels|``, averaged over nodes.

    PML's ``ZeroMeanRegularizer``, node by node; the same for a plain vector.

    Args:
        channels: D, the channels of a node.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def compute_loss(self, embeddings: Tensor) -> dict[str, Any]:
        """As PML's losses call it. Shape: ``[B, N * D]``."""
        sums = unpack(embeddings, self.channels, name="embeddings").sum(dim=2)
        return {
            "loss": {
                "losses": sums.abs().mean(dim=1),
                "indices": torch.arange(len(sums), device=sums.device),
                "reduction_type": "element",
            }
        }
