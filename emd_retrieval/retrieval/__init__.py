"""Feature store, shortlist, re-ranking, nearest neighbours and the three retrieval metrics."""

from emd_retrieval.retrieval.bootstrap import Interval, bootstrap_interval
from emd_retrieval.retrieval.candidates import Candidates
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
from emd_retrieval.retrieval.reranker import EMDReranker, Reranking
from emd_retrieval.retrieval.shortlist import FaissShortlist
from emd_retrieval.retrieval.shortlists import (
    CandidateTable,
    FaissIndexShortlist,
    QdrantShortlist,
    Shortlist,
)
from emd_retrieval.retrieval.store import (
    EncodedSets,
    LocalFeatureStore,
    StoreDamagedError,
    StoreLockedError,
    StoreManifest,
    StoreWriter,
)

__all__ = [
    "EMDKNN",
    "CandidateTable",
    "Candidates",
    "EMDReranker",
    "EncodedSets",
    "Evaluation",
    "FaissIndexShortlist",
    "FaissShortlist",
    "Interval",
    "LocalFeatureStore",
    "QdrantShortlist",
    "Ranking",
    "Reranking",
    "RetrievalScores",
    "Shortlist",
    "StoreDamagedError",
    "StoreLockedError",
    "StoreManifest",
    "StoreWriter",
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
