"""DeepEMD inside pytorch-metric-learning."""

from emd_retrieval.metric_learning.deepemd import (
    DeepEMDDistance,
    DeepEMDSimilarity,
    DeepEMDSNRDistance,
)
from emd_retrieval.metric_learning.losses import (
    LOSSES,
    MINERS,
    LossSettings,
    MetricLoss,
    build_loss,
    loss_parameters,
)

__all__ = [
    "LOSSES",
    "MINERS",
    "DeepEMDDistance",
    "DeepEMDSNRDistance",
    "DeepEMDSimilarity",
    "LossSettings",
    "MetricLoss",
    "build_loss",
    "loss_parameters",
]
