"""Training with Lightning: an extractor and a pytorch-metric-learning loss to a trained model."""

from emd_retrieval.training.batches import ImageBatches
from emd_retrieval.training.embedding import EmbeddingTask, TrainingSchedule, train_embedding

__all__ = ["EmbeddingTask", "ImageBatches", "TrainingSchedule", "train_embedding"]
