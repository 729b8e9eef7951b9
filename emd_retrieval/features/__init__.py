"""From images to sets of local features: backbones, extractors, the pyramid, packing."""

from emd_retrieval.features.backbones import Backbone, load_backbone
from emd_retrieval.features.crop_resize import crop_resize
from emd_retrieval.features.extraction import FeatureSet, extract_features
from emd_retrieval.features.extractors import (
    EXTRACTORS,
    Extractor,
    FCNExtractor,
    GridExtractor,
    SamplingExtractor,
    build_extractor,
)
from emd_retrieval.features.packing import global_vectors, pack, unpack
from emd_retrieval.features.pyramid import pyramid_boxes, pyramid_pool
from emd_retrieval.features.transforms import evaluation_transform, evaluation_view

__all__ = [
    "EXTRACTORS",
    "Backbone",
    "Extractor",
    "FCNExtractor",
    "FeatureSet",
    "GridExtractor",
    "SamplingExtractor",
    "build_extractor",
    "crop_resize",
    "evaluation_transform",
    "evaluation_view",
    "extract_features",
    "global_vectors",
    "load_backbone",
    "pack",
    "pyramid_boxes",
    "pyramid_pool",
    "unpack",
]
