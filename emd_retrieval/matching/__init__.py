"""Ground costs, node weights and the DeepEMD similarity of sets of local features."""

from emd_retrieval.matching.clusters import ClusteredNodes, cluster_nodes
from emd_retrieval.matching.ground_costs import GroundCost, ground_cost
from emd_retrieval.matching.matcher import EMDMatcher, PreparedSets, SetMatch
from emd_retrieval.matching.node_weights import (
    CrossReferenceWeights,
    NodeWeights,
    OwnWeights,
    UniformWeights,
    WeighedNodes,
    cross_reference_weights,
    node_weights,
    normalize_weights,
)
from emd_retrieval.matching.pairs import PairPlans

__all__ = [
    "ClusteredNodes",
    "CrossReferenceWeights",
    "EMDMatcher",
    "GroundCost",
    "NodeWeights",
    "OwnWeights",
    "PairPlans",
    "PreparedSets",
    "SetMatch",
    "UniformWeights",
    "WeighedNodes",
    "cluster_nodes",
    "cross_reference_weights",
    "ground_cost",
    "node_weights",
    "normalize_weights",
]
