"""Patch extractors: what Grid and Sampling share. Boxes of an image become views of their own."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_positive, check_tensor
from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.crop_resize import crop_resize
from emd_retrieval.features.extractor import Extractor
from emd_retrieval.features.transforms import (
    Evaluation,
    Normalisation,
    Span,
    Training,
    check_crop,
    pixels_of,
    random_flips,
)

# In evaluation the patches of a batch go through the backbone in parts: all at once would take the
# memory of ten to thirty times as many images.
_PATCHES_AT_ONCE = 128


class PatchLayout(ABC):
    """Where the patches of an image lie. A small object of its own: it travels to worker processes.

    Attributes:
        evaluation_flip: Whether patches are mirrored at random in evaluation too.
    """

    evaluation_flip: ClassVar[bool] = False

    @property
    @abstractmethod
    def count(self) -> int:
        """P, the patches of an image."""

    @abstractmethod
    def evaluation(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Boxes for evaluation: left, top, right, bottom in pixels. Shape: ``[P, 4]``, int64."""

    @abstractmethod
    def training(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Boxes for training: left, top, right, bottom in pixels. Shape: ``[P, 4]``, int64."""


class PatchExtractor(Extractor):
    """Every patch of an image is encoded by itself; its pooled feature is a node (Section 4.2).

    The patches lie on the part of the image that the protocol keeps for whole-image views: the
    centre square whose side is ``crop / resize`` of the short side. Their pixels are those of the
    image at its own resolution, as in the reference code, so that no earlier resize takes detail
    away. ``crop=None`` takes the whole image, as the reference code does for few-shot images; on
    CUB, where birds are in the middle, the centre gives better features (``docs/extractors.md``).

    Args:
        backbone: A dense feature extractor.
        layout: Where the patches lie.
        patch_size: Side of a patch, in pixels; by default that of the images that the backbone was
            trained on.
        embedding_size: Channels of the linear embedder; ``None`` for the backbone's own features.

    Shape:
        ``[B, P, 3, p, p]`` to ``[B, P, D]``.
    """

    def __init__(
        self,
        backbone: Backbone,
        layout: PatchLayout,
        *,
        patch_size: int | None = None,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__(backbone, embedding_size=embedding_size)
        self.layout = layout
        self.patch_size = backbone.input_size if patch_size is None else patch_size
        check_positive("patch_size", self.patch_size)

    @property
    def num_nodes(self) -> int:
        """P, the patches of an image."""
        return self.layout.count

    def evaluation_transform(
        self, *, resize: int = 256, crop: int | None = 224, seed: int = 0
    ) -> Evaluation:
        """The patches of the centre, or with ``crop=None`` of the whole image, normalised.

        Shape:
            ``[P, 3, p, p]``.
        """
        normalise = Normalisation.of(self.backbone)
        field = _Field(resize, crop)
        return _EvaluationPatches(self.layout, field, self.patch_size, normalise, seed)

    def training_transform(
        self,
        *,
        resize: int = 256,
        crop: int | None = 224,
        scale: Span = (0.16, 1.0),
        ratio: Span = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> Training:
        """Patches of the same part of the image as the generator draws them, normalised.

        As in the reference code all randomness is that of the patches: ``scale`` and ``ratio``,
        which shape whole-image views, are not used. ``flip`` mirrors patches each by itself.

        Shape:
            ``[P, 3, p, p]``.
        """
        normalise = Normalisation.of(self.backbone)
        field = _Field(resize, crop)
        return _TrainingPatches(self.layout, field, self.patch_size, normalise, flip)

    def evaluation_view(
        self, *, resize: int = 256, crop: int | None = 224
    ) -> Callable[[Any], NDArray[np.uint8]]:
        """The centre, or with ``crop=None`` the whole image. Shape: ``[h, w, 3]``, uint8."""
        return _Field(resize, crop).picture

    def node_boxes(
        self, image: Any = None, *, resize: int = 256, crop: int | None = 224, seed: int = 0
    ) -> Tensor | None:
        """Where the patches lie, as shares of the view of ``image``. Shape: ``[P, 4]``."""
        if image is None:
            return None
        left, top, right, bottom = _Field(resize, crop).box(image.height, image.width)
        width, height = right - left, bottom - top
        boxes = self.layout.evaluation(height, width, _generator(image, seed))
        return boxes / torch.tensor([width, height] * 2)

    def trunk(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled feature of each patch, and their mean.

        Shape:
            ``[B, P, 3, p, p]`` to ``[B, P, C]`` and ``[B, C]``.
        """
        sizes = check_tensor("views", views, ["B", "P", 3, "h", "w"])
        patches = views.flatten(0, 1)
        # With gradients all is kept anyway, and batch norms in training must see every patch.
        whole = torch.is_grad_enabled() or self.backbone.training
        parts = (patches,) if whole else patches.split(_PATCHES_AT_ONCE)
        features = torch.cat([self._feature_map(part).mean(dim=(2, 3)) for part in parts])
        nodes = features.unflatten(0, (sizes["B"], sizes["P"]))
        return nodes, nodes.mean(dim=1)


@dataclass(frozen=True)
class _Field:
    """The part of an image on which the patches lie."""

    resize: int
    crop: int | None

    def __post_init__(self) -> None:
        if self.crop is not None:
            check_crop(self.resize, self.crop)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom, in pixels."""
        if self.crop is None:
            return 0, 0, width, height
        side = max(1, round(min(height, width) * self.crop / self.resize))
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    def picture(self, image: Any) -> NDArray[np.uint8]:
        return np.asarray(image.crop(self.box(image.height, image.width)))


@dataclass(frozen=True)
class _EvaluationPatches:
    layout: PatchLayout
    field: _Field
    size: int
    normalise: Normalisation
    seed: int

    def __call__(self, image: Any) -> Tensor:
        generator = _generator(image, self.seed)
        patches = _cut(image, self.field, self.layout.evaluation, self.size, generator)
        if self.layout.evaluation_flip:
            patches = random_flips(patches, generator)
        return self.normalise(patches)


@dataclass(frozen=True)
class _TrainingPatches:
    layout: PatchLayout
    field: _Field
    size: int
    normalise: Normalisation
    flip: bool

    def __call__(self, image: Any, generator: torch.Generator) -> Tensor:
        patches = _cut(image, self.field, self.layout.training, self.size, generator)
        if self.flip:
            patches = random_flips(patches, generator)
        return self.normalise(patches)


def _cut(
    image: Any,
    field: _Field,
    boxes_of: Callable[[int, int, torch.Generator], Tensor],
    size: int,
    generator: torch.Generator,
) -> Tensor:
    """The patches of an image, uint8. Shape: ``[P, 3, size, size]``."""
    left, top, right, bottom = field.box(image.height, image.width)
    boxes = boxes_of(bottom - top, right - left, generator)
    boxes = boxes + torch.tensor([left, top, left, top])
    return crop_resize(pixels_of(image).unsqueeze(0), boxes.unsqueeze(0), size)[0]


def _generator(image: Any, seed: int) -> torch.Generator:
    """Randomness that belongs to the pixels of an image, whatever else is drawn or loaded."""
    # The size too: the same bytes in another shape are another image. torch's CPU generator reads
    # 32 bits of a seed, so both numbers must go into one checksum.
    start = zlib.crc32(f"{seed} {image.width} {image.height}".encode())
    return torch.Generator().manual_seed(zlib.crc32(image.tobytes(), start))
