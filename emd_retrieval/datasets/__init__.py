"""Labelled image collections: CUB-200-2011, any image folder, and the built-in demo birds."""

from emd_retrieval.datasets.base import (
    ClassSpec,
    ImageCollection,
    ImageDataset,
    UnreadableImage,
    UnreadableImageError,
    check_readable,
    decode_rgb,
    find_unreadable,
)
from emd_retrieval.datasets.bird_drawing import BirdSpecies, draw_bird
from emd_retrieval.datasets.cub import load_cub
from emd_retrieval.datasets.demo_birds import demo_birds, demo_species
from emd_retrieval.datasets.image_folder import (
    load_image_folder,
    load_images,
    save_image_folder,
)

__all__ = [
    "BirdSpecies",
    "ClassSpec",
    "ImageCollection",
    "ImageDataset",
    "UnreadableImage",
    "UnreadableImageError",
    "check_readable",
    "decode_rgb",
    "demo_birds",
    "demo_species",
    "draw_bird",
    "find_unreadable",
    "load_cub",
    "load_image_folder",
    "load_images",
    "save_image_folder",
]
