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

__all__ = [
    "Demo",
    "EvaluateImages",
    "EvaluateRanking",
    "EvaluateSets",
    "evaluate_images",
    "evaluate_ranking",
    "evaluate_stored_sets",
    "run_demo",
]
