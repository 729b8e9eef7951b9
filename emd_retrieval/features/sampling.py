"""DeepEMD-Sampling: patches of random place, size and aspect ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from emd_retrieval._checks import check_positive
from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.patches import PatchExtractor, PatchLayout
from emd_retrieval.features.transforms import Span, check_spans, random_boxes


@dataclass(frozen=True)
class SamplingLayout(PatchLayout):
    """Boxes as torchvision's RandomResizedCrop draws them, in evaluation too.

    Attributes:
        patches: P.
        scale: Least and largest area, as shares of the image.
        ratio: Least and largest width over height.
    """

    evaluation_flip: ClassVar[bool] = True

    patches: int
    scale: Span
    ratio: Span

    @property
    def count(self) -> int:
        """P, the patches of an image."""
        return self.patches

    def evaluation(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """As in training; the generator is that of the image. Shape: ``[P, 4]``, int64."""
        return self.training(height, width, generator)

    def training(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Random boxes. Shape: ``[P, 4]``, int64."""
        return random_boxes(height, width, self.patches, self.scale, self.ratio, generator)


class SamplingExtractor(PatchExtractor):
    """DeepEMD-Sampling: random patches are encoded one by one (Section 4.2).

    In evaluation a checksum of the pixels seeds the draw, so that an image has the same patches in
    any collection, order and process. As in the reference code patches are mirrored at random in
    evaluation too.

    Args:
        backbone: A dense feature extractor.
        patches: Patches an image; 25 in the paper's retrieval setting, 9 by default in its code.
        patch_size: Side of a patch, in pixels; by default the backbone's own input size.
        scale: Least and largest area of a patch, as shares of the image.
        ratio: Least and largest width over height of a patch.
        embedding_size: Channels of the linear embedder; ``None`` for the backbone's own features.

    Shape:
        ``[B, P, 3, p, p]`` to ``[B, P, D]``.
    """

    name: ClassVar[str] = "sampling"

    def __init__(
        self,
        backbone: Backbone,
        *,
        patches: int = 25,
        patch_size: int | None = None,
        scale: Span = (0.08, 1.0),
        ratio: Span = (3 / 4, 4 / 3),
        embedding_size: int | None = None,
    ) -> None:
        check_positive("patches", patches)
        check_spans(scale, ratio)
        layout = SamplingLayout(patches, (scale[0], scale[1]), (ratio[0], ratio[1]))
        super().__init__(backbone, layout, patch_size=patch_size, embedding_size=embedding_size)
        self.layout: SamplingLayout

    def _settings(self) -> dict[str, Any]:
        return {
            "patches": self.layout.patches,
            "patch_size": self.patch_size,
            "scale": list(self.layout.scale),
            "ratio": list(self.layout.ratio),
        }
