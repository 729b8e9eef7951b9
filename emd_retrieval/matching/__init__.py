"""Ground costs, node weights and the DeepEMD similarity of sets of local features."""

from emd_retrieval.matching.ground_costs import GroundCost, ground_cost
from emd_retrieval.matching.matcher import EMDMatcher, PreparedSets, SetMatch
from emd_retrieval.matching.node_weights import (
    CrossReferenceWeights,
    NodeWeights,
    UniformWeights,
    WeighedNodes,
    cross_reference_weights,
    node_weights,
    normalize_weights,
)

__all__ = [
    "CrossReferenceWeights",
    "EMDMatcher",
    "GroundCost",
    "NodeWeights",
    "PreparedSets",
    "SetMatch",
    "UniformWeights",
    "WeighedNodes",
    "cross_reference_weights",
    "ground_cost",
    "node_weights",
    "normalize_weights",
]
