"""Training views of few-shot images: from memory, augmented in batches on the device, or decoded.

Which images a batch has, and what a step does with them, is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emd_retrieval.datasets import ImageCollection
from emd_retrieval.features import Extractor
from emd_retrieval.features.transforms import Normalisation, Training, random_boxes
from emd_retrieval.fewshot.recipe import FewshotViews
from emd_retrieval.training.draws import generator_of

_RESIDENT_BYTES = 4 * 2**30


class ViewSource(Protocol):
    """Where the views of a batch come from, in two parts."""

    def fetch(self, number: int, rows: Tensor) -> Tensor:
        """What a loading process does for the batch of this number."""
        ...

    def finish(self, number: int, fetched: Tensor) -> Tensor:
        """What is left to do on the device; gives normalised views."""
        ...


class MemoryViews:
    """Images of one size in memory: each batch is cropped, resized, mirrored on its device at once.

    Crops are resized bilinearly without antialiasing, which is for images that are not much larger
    than the crop.

    Args:
        pixels: All images. Shape: ``[n, 3, H, W]``, uint8.
        views: Crop, scale, ratio and flip.
        normalise: Of the backbone.
        seed: Of the views.
    """

    def __init__(
        self, pixels: Tensor, views: FewshotViews, normalise: Normalisation, seed: int
    ) -> None:
        self.pixels = pixels
        self.views = views
        self.normalise = normalise
        self.seed = seed

    def fetch(self, number: int, rows: Tensor) -> Tensor:
        """The pixels of some images. Shape: ``[b]`` to ``[b, 3, H, W]``."""
        return self.pixels[rows]

    def finish(self, number: int, fetched: Tensor) -> Tensor:
        """Random crops. Shape: ``[b, 3, H, W]`` uint8 to ``[b, 3, crop, crop]``."""
        count, _, height, width = fetched.shape
        generator = generator_of("views", self.seed, number)
        boxes = random_boxes(
            height, width, count, self.views.scale, self.views.ratio, generator
        ).float()
        mirror = torch.ones(count)
        if self.views.flip:
            mirror -= 2.0 * (torch.rand(count, generator=generator) < 0.5)
        size = torch.tensor([width, height], dtype=torch.float32)
        share = (boxes[:, 2:] - boxes[:, :2]) / size
        centre = (boxes[:, 2:] + boxes[:, :2]) / size - 1
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = share[:, 0] * mirror, share[:, 1]
        theta[:, :, 2] = centre
        side = self.views.crop
        grid = F.affine_grid(theta.to(fetched.device), [count, 3, side, side], align_corners=False)
        mean, std = (
            (255 * torch.tensor(values, device=fetched.device)).view(3, 1, 1)
            for values in (self.normalise.mean, self.normalise.std)
        )
        crops = F.grid_sample(
            fetched.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return ((crops - mean) / std).contiguous(memory_format=torch.channels_last)


class DecodedViews:
    """Images of any size, and patches: each is decoded and cut by itself, in loading processes.

    Args:
        collection: The images.
        transform: From an image and a generator to views.
        seed: Of the views.
    """

    def __init__(self, collection: ImageCollection, transform: Training, seed: int) -> None:
        self.collection = collection
        self.transform = transform
        self.seed = seed

    def fetch(self, number: int, rows: Tensor) -> Tensor:
        """The views of some images. Shape: ``[b]`` to ``[b, ...]``."""
        views = []
        for place, row in enumerate(rows.tolist()):
            generator = generator_of("image", self.seed, number, place)
            views.append(self.transform(self.collection.load(row), generator))
        return torch.stack(views)

    def finish(self, number: int, fetched: Tensor) -> Tensor:
        """Nothing is left to do."""
        return fetched


def resident_pixels(
    collection: ImageCollection, *, resident_bytes: int = _RESIDENT_BYTES
) -> Tensor | None:
    """All images of a collection in memory, if they are of one size and small enough.

    Returns:
        Shape: ``[n, 3, H, W]``, uint8; ``None`` where they do not fit.
    """
    if isinstance(collection.images, np.ndarray):
        pixels = torch.from_numpy(np.array(collection.images))
        return pixels.permute(0, 3, 1, 2).contiguous()
    width, height = collection.load(0).size
    if len(collection) * width * height * 3 > resident_bytes:
        return None
    found = torch.empty(len(collection), 3, height, width, dtype=torch.uint8)
    for row in range(len(collection)):
        image = collection.load(row)
        if image.size != (width, height):
            return None
        found[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return found


def training_views(
    collection: ImageCollection, extractor: Extractor, views: FewshotViews, seed: int
) -> ViewSource:
    """The fastest source of an extractor's training views."""
    if extractor.name == "fcn":
        pixels = resident_pixels(collection)
        # Beyond twice the crop, bilinear resizing would skip pixels.
        if pixels is not None and max(pixels.shape[2:]) <= 2 * views.crop:
            return MemoryViews(pixels, views, Normalisation.of(extractor.backbone), seed)
    views = views_of(extractor, views)
    transform = extractor.training_transform(
        resize=views.resize, crop=views.crop, scale=views.scale, ratio=views.ratio, flip=views.flip
    )
    return DecodedViews(collection, transform, seed)


def views_of(extractor: Extractor, views: FewshotViews) -> FewshotViews:
    """How images are cut for an extractor: patches lie on the largest centre square."""
    return views if extractor.name == "fcn" else replace(views, crop=views.resize)
