"""Image retrieval by the Earth Mover's Distance between sets of local features (DeepEMD).

The names below are the public ones. They are imported on first use, so that ``import
emd_retrieval`` and ``emd-retrieval --help`` do not wait for torch and its friends.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "emd_retrieval.transport": (
        "TransportPlan", "available_solvers", "emd", "lower_bound", "raise_pending_faults",
        "solve", "solve_top_k",
    ),
    "emd_retrieval.matching": (
        "EMDMatcher", "SetMatch", "cluster_nodes", "cross_reference_weights", "ground_cost",
    ),
    "emd_retrieval.features": (
        "Backbone", "Extractor", "FCNExtractor", "FeatureSet", "GridExtractor",
        "SamplingExtractor", "build_extractor", "extract_features", "global_vectors",
        "load_backbone", "pack", "pyramid_pool", "unpack",
    ),
    "emd_retrieval.datasets": ("ImageCollection", "ImageDataset", "demo_birds", "load_images"),
    "emd_retrieval.metric_learning": (
        "DeepEMDDistance", "DeepEMDSNRDistance", "DeepEMDSimilarity", "LossSettings",
        "MetricLoss", "build_loss",
    ),
    "emd_retrieval.retrieval": (
        "EMDKNN", "EMDReranker", "Evaluation", "FaissShortlist", "LocalFeatureStore", "Ranking",
        "compare_rankings", "evaluate_sets", "score_ranking", "search_sets",
    ),
    "emd_retrieval.training": ("Recipe", "TrainedModel", "load_model", "load_recipe", "train"),
    "emd_retrieval.records": ("ResultRecord",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "EMDKNN",
    "Backbone",
    "DeepEMDDistance",
    "DeepEMDSNRDistance",
    "DeepEMDSimilarity",
    "EMDMatcher",
    "EMDReranker",
    "Evaluation",
    "Extractor",
    "FCNExtractor",
    "FaissShortlist",
    "FeatureSet",
    "GridExtractor",
    "ImageCollection",
    "ImageDataset",
    "LocalFeatureStore",
    "LossSettings",
    "MetricLoss",
    "Ranking",
    "Recipe",
    "ResultRecord",
    "SamplingExtractor",
    "SetMatch",
    "TrainedModel",
    "TransportPlan",
    "available_solvers",
    "build_extractor",
    "build_loss",
    "cluster_nodes",
    "compare_rankings",
    "cross_reference_weights",
    "demo_birds",
    "emd",
    "evaluate_sets",
    "extract_features",
    "global_vectors",
    "ground_cost",
    "load_backbone",
    "load_images",
    "load_model",
    "load_recipe",
    "lower_bound",
    "pack",
    "pyramid_pool",
    "raise_pending_faults",
    "score_ranking",
    "search_sets",
    "solve",
    "solve_top_k",
    "train",
    "unpack",
]

if TYPE_CHECKING:
    from emd_retrieval.datasets import (
        ImageCollection,
        ImageDataset,
        demo_birds,
        load_images,
    )
    from emd_retrieval.features import (
        Backbone,
        Extractor,
        FCNExtractor,
        FeatureSet,
        GridExtractor,
        SamplingExtractor,
        build_extractor,
        extract_features,
        global_vectors,
        load_backbone,
        pack,
        pyramid_pool,
        unpack,
    )
    from emd_retrieval.matching import (
        EMDMatcher,
        SetMatch,
        cluster_nodes,
        cross_reference_weights,
        ground_cost,
    )
    from emd_retrieval.metric_learning import (
        DeepEMDDistance,
        DeepEMDSimilarity,
        DeepEMDSNRDistance,
        LossSettings,
        MetricLoss,
        build_loss,
    )
    from emd_retrieval.records import (
        ResultRecord,
    )
    from emd_retrieval.retrieval import (
        EMDKNN,
        EMDReranker,
        Evaluation,
        FaissShortlist,
        LocalFeatureStore,
        Ranking,
        compare_rankings,
        evaluate_sets,
        score_ranking,
        search_sets,
    )
    from emd_retrieval.training import (
        Recipe,
        TrainedModel,
        load_model,
        load_recipe,
        train,
    )
    from emd_retrieval.transport import (
        TransportPlan,
        available_solvers,
        emd,
        lower_bound,
        raise_pending_faults,
        solve,
        solve_top_k,
    )


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'emd_retrieval' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
