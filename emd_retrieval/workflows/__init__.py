"""What a command does, end to end, as a function: settings in, a result record out.

Here datasets, features, retrieval and reports meet; the command line only parses and prints.
"""

from emd_retrieval.workflows.demo import Demo, run_demo
from emd_retrieval.workflows.evaluate import (
    EvaluateImages,
    EvaluateRanking,
    EvaluateSets,
    evaluate_images,
    evaluate_ranking,
    evaluate_stored_sets,
)
from emd_retrieval.workflows.extract import ExtractedStore, ExtractImages, extract_images
from emd_retrieval.workflows.rerank import RerankQueries, rerank_queries
from emd_retrieval.workflows.search import SearchImage, search_image
from emd_retrieval.workflows.table8 import Table8, run_table8
from emd_retrieval.workflows.train import Machine, TrainRecipe, train_recipe
from emd_retrieval.workflows.tune import TuneReranking, tune_queries

__all__ = [
    "Demo",
    "EvaluateImages",
    "EvaluateRanking",
    "EvaluateSets",
    "ExtractImages",
    "ExtractedStore",
    "Machine",
    "RerankQueries",
    "SearchImage",
    "Table8",
    "TrainRecipe",
    "TuneReranking",
    "evaluate_images",
    "evaluate_ranking",
    "evaluate_stored_sets",
    "extract_images",
    "rerank_queries",
    "run_demo",
    "run_table8",
    "search_image",
    "train_recipe",
    "tune_queries",
]
