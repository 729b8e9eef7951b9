"""Labelled image collections: CUB, any image folder, the few-shot benchmarks, the demo birds."""

from emd_retrieval.datasets.base import (
    ClassSpec,
    ImageCollection,
    ImageDataset,
    UnreadableImage,
    check_readable,
    find_unreadable,
    path_below,
)
from emd_retrieval.datasets.bird_drawing import BirdSpecies, draw_bird
from emd_retrieval.datasets.cifar import load_cifar100, load_cifar_fs, load_fc100
from emd_retrieval.datasets.cub import load_cub
from emd_retrieval.datasets.decoding import UnreadableImageError, decode_rgb
from emd_retrieval.datasets.demo_birds import demo_birds, demo_species
from emd_retrieval.datasets.fewshot import (
    FEWSHOT_DATASETS,
    load_cub_fewshot,
    load_fewshot,
    load_split_folders,
)
from emd_retrieval.datasets.fewshot_splits import SPLITS
from emd_retrieval.datasets.image_folder import (
    image_files,
    load_image_folder,
    load_images,
    save_image_folder,
)
from emd_retrieval.datasets.imagenet_fewshot import load_mini_imagenet, load_tiered_imagenet

__all__ = [
    "FEWSHOT_DATASETS",
    "SPLITS",
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
    "image_files",
    "load_cifar100",
    "load_cifar_fs",
    "load_cub",
    "load_cub_fewshot",
    "load_fc100",
    "load_fewshot",
    "load_image_folder",
    "load_images",
    "load_mini_imagenet",
    "load_split_folders",
    "load_tiered_imagenet",
    "path_below",
    "save_image_folder",
]
