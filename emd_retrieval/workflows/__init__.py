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
from emd_retrieval.workflows.explain import ExplainImages, explain_episode, explain_images
from emd_retrieval.workflows.explorer import collect_explorer
from emd_retrieval.workflows.extract import ExtractedStore, ExtractImages, extract_images
from emd_retrieval.workflows.fewshot import (
    FewshotStage,
    FewshotTrial,
    fewshot_pretrain,
    fewshot_test,
    fewshot_train,
)
from emd_retrieval.workflows.fewshot_tables import (
    FewshotTable,
    fewshot_figure,
    fewshot_table,
)
from emd_retrieval.workflows.models import FeatureSettings
from emd_retrieval.workflows.report import write_charts, write_report
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
    "ExplainImages",
    "ExtractImages",
    "ExtractedStore",
    "FeatureSettings",
    "FewshotStage",
    "FewshotTable",
    "FewshotTrial",
    "Machine",
    "RerankQueries",
    "SearchImage",
    "Table8",
    "TrainRecipe",
    "TuneReranking",
    "collect_explorer",
    "evaluate_images",
    "evaluate_ranking",
    "evaluate_stored_sets",
    "explain_episode",
    "explain_images",
    "extract_images",
    "fewshot_figure",
    "fewshot_pretrain",
    "fewshot_table",
    "fewshot_test",
    "fewshot_train",
    "rerank_queries",
    "run_demo",
    "run_table8",
    "search_image",
    "train_recipe",
    "tune_queries",
    "write_charts",
    "write_report",
]
