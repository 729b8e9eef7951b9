"""Training with Lightning: an extractor and a pytorch-metric-learning loss to a trained model."""

from emd_retrieval.training.batches import ImageBatches
from emd_retrieval.training.data import load_recipe_data
from emd_retrieval.training.embedding import EmbeddingTask, TrainingSchedule, train_embedding
from emd_retrieval.training.model import (
    TrainedModel,
    build_model,
    embed_collection,
    load_model,
)
from emd_retrieval.training.recipe import (
    METHODS,
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    Recipe,
    ValidationSettings,
    ViewSettings,
    recipe_from_dict,
)
from emd_retrieval.training.recipe_files import load_recipe
from emd_retrieval.training.run import TrainedRun, train
from emd_retrieval.training.task import NonFiniteLossError
from emd_retrieval.training.trunk_cache import TrunkCache

__all__ = [
    "METHODS",
    "DataSettings",
    "EmbeddingTask",
    "ImageBatches",
    "ModelSettings",
    "NonFiniteLossError",
    "OptimizationSettings",
    "Recipe",
    "TrainedModel",
    "TrainedRun",
    "TrainingSchedule",
    "TrunkCache",
    "ValidationSettings",
    "ViewSettings",
    "build_model",
    "embed_collection",
    "load_model",
    "load_recipe",
    "load_recipe_data",
    "recipe_from_dict",
    "train",
    "train_embedding",
]
