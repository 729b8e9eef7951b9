"""Few-shot recognition: episodes, classifiers by EMD and the paper's baselines, evaluation."""

from emd_retrieval.fewshot.baselines import (
    FC_FINE_TUNING,
    FullyConnected,
    LocalKNN,
    MatchingNet,
    PredictionFusion,
    ProtoNet,
)
from emd_retrieval.fewshot.classifier import TEMPERATURE, Bank, EpisodeClassifier
from emd_retrieval.fewshot.emd_classifiers import (
    SFC_PAPER,
    SFC_REFERENCE,
    SFC_REFERENCE_EVALUATION,
    EMDClassifier,
    EMDFusion,
    EMDMerge,
    EMDNearest,
    EMDPrototype,
    StructuredFC,
)
from emd_retrieval.fewshot.episodes import Episodes, draw_episodes
from emd_retrieval.fewshot.evaluation import EpisodeScores, evaluate_episodes
from emd_retrieval.fewshot.fine_tuning import FineTuning
from emd_retrieval.fewshot.matches import EpisodeMatches, episode_matches
from emd_retrieval.fewshot.similarity import episode_similarity, prepare_sets

__all__ = [
    "FC_FINE_TUNING",
    "SFC_PAPER",
    "SFC_REFERENCE",
    "SFC_REFERENCE_EVALUATION",
    "TEMPERATURE",
    "Bank",
    "EMDClassifier",
    "EMDFusion",
    "EMDMerge",
    "EMDNearest",
    "EMDPrototype",
    "EpisodeClassifier",
    "EpisodeMatches",
    "EpisodeScores",
    "Episodes",
    "FineTuning",
    "FullyConnected",
    "LocalKNN",
    "MatchingNet",
    "PredictionFusion",
    "ProtoNet",
    "StructuredFC",
    "draw_episodes",
    "episode_matches",
    "episode_similarity",
    "evaluate_episodes",
    "prepare_sets",
]
