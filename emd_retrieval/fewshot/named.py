"""Classifiers by name, as recipes and the command line ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from emd_retrieval._checks import check_choice
from emd_retrieval.fewshot.baselines import (
    FullyConnected,
    LocalKNN,
    MatchingNet,
    PredictionFusion,
    ProtoNet,
)
from emd_retrieval.fewshot.classifier import EpisodeClassifier
from emd_retrieval.fewshot.emd_classifiers import (
    SFC_PAPER,
    EMDFusion,
    EMDMerge,
    EMDNearest,
    EMDPrototype,
    StructuredFC,
)
from emd_retrieval.matching import EMDMatcher

_BY_EMD: dict[str, Callable[[EMDMatcher], EpisodeClassifier[Any]]] = {
    "nearest": EMDNearest,
    "fusion": EMDFusion,
    "merge": EMDMerge,
    "prototype": EMDPrototype,
}
_OTHERS: dict[str, Callable[[], EpisodeClassifier[Any]]] = {
    "proto_net": ProtoNet,
    "matching_net": MatchingNet,
    "fc_dot": lambda: FullyConnected("dot"),
    "fc_cosine": lambda: FullyConnected("cosine"),
    "knn": LocalKNN,
    "prediction_fusion": PredictionFusion,
}
CLASSIFIERS = (*_BY_EMD, "sfc", *_OTHERS)
"""What :func:`build_classifier` knows."""

LEARNED = ("sfc", "fc_dot", "fc_cosine")
"""Those that learn from the support images of each episode."""


def check_classifier(where: str, name: str) -> str:
    """The name, if there is such a classifier.

    Raises:
        ValueError: If there is none; the nearest one is told.
    """
    return check_choice(where, name, CLASSIFIERS)


def build_classifier(
    name: str, matcher: EMDMatcher, *, sfc_learning_rate: float | None = None
) -> EpisodeClassifier[Any]:
    """A classifier of :data:`CLASSIFIERS`.

    Args:
        name: Which.
        matcher: Of those by EMD.
        sfc_learning_rate: In place of that of :data:`SFC_PAPER`.

    Raises:
        ValueError: If there is none of this name.
    """
    check_classifier("classifier", name)
    if name == "sfc":
        rate = SFC_PAPER.learning_rate if sfc_learning_rate is None else sfc_learning_rate
        return StructuredFC(matcher, fine_tuning=replace(SFC_PAPER, learning_rate=rate))
    return _BY_EMD[name](matcher) if name in _BY_EMD else _OTHERS[name]()
