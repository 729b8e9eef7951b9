"""DeepEMD-Grid: an image pyramid of grid cells, each enlarged to take in its surroundings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.patches import PatchExtractor, PatchLayout
from emd_retrieval.features.pyramid import check_pyramid
from emd_retrieval.features.transforms import Span


@dataclass(frozen=True)
class GridLayout(PatchLayout):
    """The cells of one grid after the other.

    Attributes:
        grid: Levels; level n divides the image into n x n cells.
        context: How far a cell is enlarged for evaluation.
        training_context: The range of that in training, drawn once a level.
    """

    grid: tuple[int, ...]
    context: float
    training_context: Span

    @property
    def count(self) -> int:
        """P, the cells of all levels."""
        return sum(level * level for level in self.grid)

    def shares(self, contexts: Sequence[float]) -> Tensor:
        """Boxes as shares of an image, one context a level. Shape: ``[P, 4]``, float64."""
        boxes = []
        for level, context in zip(self.grid, contexts, strict=True):
            centres = (torch.arange(level, dtype=torch.float64) + 0.5) / level
            half = context / level / 2
            start, stop = (centres - half).clamp(min=0), (centres + half).clamp(max=1)
            rows, columns = (
                side.flatten() for side in torch.meshgrid(*[torch.arange(level)] * 2, indexing="ij")
            )
            boxes.append(torch.stack([start[columns], start[rows], stop[columns], stop[rows]], 1))
        return torch.cat(boxes)

    def evaluation(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Every cell enlarged by ``context``. Shape: ``[P, 4]``, int64."""
        return _whole_pixels(self.shares([self.context] * len(self.grid)), height, width)

    def training(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The cells of each level enlarged by a context of its own. Shape: ``[P, 4]``, int64."""
        low, high = self.training_context
        draws = torch.rand(len(self.grid), generator=generator, dtype=torch.float64)
        return _whole_pixels(self.shares((low + (high - low) * draws).tolist()), height, width)


class GridExtractor(PatchExtractor):
    """DeepEMD-Grid: the cells of an image pyramid are encoded one by one (Section 4.2, Figure 3b).

    A cell is enlarged about its centre to take in its surroundings ("context"), clamped to the
    image, and resized to a square.

    Args:
        backbone: A dense feature extractor.
        grid: Levels of the image pyramid; the paper's retrieval setting ``(3, 2)`` gives 9 + 4 = 13
            patches.
        patch_size: Side of a patch, in pixels; by default the backbone's own input size.
        context: How far a cell is enlarged for evaluation; 2 doubles its sides.
        training_context: Range of the context in training, uniform, one draw a level; by default 1
            to ``2 * context - 1``, whose mean is ``context`` (the reference code's 1 to 3).
        embedding_size: Channels of the linear embedder; ``None`` for the backbone's own features.

    Shape:
        ``[B, P, 3, p, p]`` to ``[B, P, D]``.
    """

    name: ClassVar[str] = "grid"

    def __init__(
        self,
        backbone: Backbone,
        *,
        grid: Sequence[int] = (3, 2),
        patch_size: int | None = None,
        context: float = 2.0,
        training_context: Span | None = None,
        embedding_size: int | None = None,
    ) -> None:
        levels = check_pyramid(grid, include_map=False, name="grid")
        if not 1 <= context < math.inf:
            raise ValueError(f"context: expected 1 (the cell alone) or more, got {context}")
        span = (1.0, 2 * context - 1) if training_context is None else tuple(training_context)
        if len(span) != 2 or not 1 <= span[0] <= span[1] < math.inf:
            raise ValueError(
                f"training_context: expected a range, 1 <= least <= largest, got {list(span)}"
            )
        layout = GridLayout(levels, context, (span[0], span[1]))
        super().__init__(backbone, layout, patch_size=patch_size, embedding_size=embedding_size)
        self.layout: GridLayout

    def node_boxes(
        self, image: Any = None, *, resize: int = 256, crop: int | None = 224, seed: int = 0
    ) -> Tensor:
        """Where the patches lie, as shares of any view. Shape: ``[P, 4]``."""
        return self.layout.shares([self.layout.context] * len(self.layout.grid)).float()

    def _settings(self) -> dict[str, Any]:
        return {
            "grid": list(self.layout.grid),
            "patch_size": self.patch_size,
            "context": self.layout.context,
            "training_context": list(self.layout.training_context),
        }


def _whole_pixels(shares: Tensor, height: int, width: int) -> Tensor:
    """Shares of an image as its nearest pixels, at least one a side. Shape: ``[P, 4]``, int64."""
    edges = (shares * torch.tensor([width, height] * 2)).add(0.5).floor().long()
    start = edges[:, :2].minimum(torch.tensor([width - 1, height - 1]))
    return torch.cat([start, edges[:, 2:].maximum(start + 1)], dim=1)
