"""Shortlist, re-ranking, nearest neighbours and the three retrieval metrics."""

from emd_retrieval.retrieval.bootstrap import Interval, bootstrap_interval
from emd_retrieval.retrieval.evaluation import (
    Evaluation,
    compare_rankings,
    evaluate_sets,
    evaluate_vectors,
    summarize,
)
from emd_retrieval.retrieval.knn import EMDKNN, search_sets
from emd_retrieval.retrieval.metrics import (
    RetrievalScores,
    map_at_r,
    precision_at_1,
    r_precision,
    score_ranking,
)
from emd_retrieval.retrieval.ranking import Ranking, rank_by
from emd_retrieval.retrieval.shortlist import FaissShortlist

__all__ = [
    "EMDKNN",
    "Evaluation",
    "FaissShortlist",
    "Interval",
    "Ranking",
    "RetrievalScores",
    "bootstrap_interval",
    "compare_rankings",
    "evaluate_sets",
    "evaluate_vectors",
    "map_at_r",
    "precision_at_1",
    "r_precision",
    "rank_by",
    "score_ranking",
    "search_sets",
    "summarize",
]
