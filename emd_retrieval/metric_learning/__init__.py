"""DeepEMD inside pytorch-metric-learning."""

from emd_retrieval.metric_learning.deepemd import DeepEMDDistance, DeepEMDSimilarity

__all__ = ["DeepEMDDistance", "DeepEMDSimilarity"]
