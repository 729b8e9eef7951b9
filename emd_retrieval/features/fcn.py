"""DeepEMD-FCN: one view of an image, its feature map pooled into nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_tensor
from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.extractor import Extractor
from emd_retrieval.features.pyramid import check_pyramid, pyramid_boxes, pyramid_pool
from emd_retrieval.features.transforms import (
    Evaluation,
    Span,
    Training,
    evaluation_transform,
    evaluation_view,
    training_transform,
)


class FCNExtractor(Extractor):
    """DeepEMD-FCN: the cells of a pooled feature map are the nodes (Section 4.2).

    The embedder is applied to the pooled nodes, which are fewer than the cells of the map.

    Args:
        backbone: A dense feature extractor.
        pyramid: Levels of the feature pyramid; the paper's retrieval setting is ``(3, 2, 1)``.
        include_map: Append the cells of the map itself.
        embedding_size: Channels of the linear embedder (the paper's retrieval setting is 128);
            ``None`` for the backbone's own features.

    Shape:
        ``[B, 3, h, w]`` to ``[B, N, D]``.
    """

    name: ClassVar[str] = "fcn"

    def __init__(
        self,
        backbone: Backbone,
        *,
        pyramid: Sequence[int] = (3, 2, 1),
        include_map: bool = False,
        embedding_size: int | None = None,
    ) -> None:
        levels = check_pyramid(pyramid, include_map)
        super().__init__(backbone, embedding_size=embedding_size)
        self.pyramid = levels
        self.include_map = include_map
        self._map_sides: dict[int, int] = {}

    @property
    def num_nodes(self) -> int | None:
        """N; ``None`` with ``include_map``, which appends as many cells as the map has."""
        return None if self.include_map else sum(size * size for size in self.pyramid)

    @property
    def global_node(self) -> int | None:
        """Index of the 1x1 node, which is the pooled feature; ``None`` if the pyramid has none."""
        if 1 not in self.pyramid:
            return None
        return sum(size * size for size in self.pyramid[: self.pyramid.index(1)])

    def node_boxes(
        self, image: Any = None, *, resize: int = 256, crop: int | None = 224, seed: int = 0
    ) -> Tensor | None:
        """Where the nodes lie, as shares of any view; a cell of the map is its share of the view.

        Shape:
            ``[N, 4]``: left, top, right, bottom.
        """
        if not self.include_map:
            return pyramid_boxes(self.pyramid)
        return pyramid_boxes((*self.pyramid, self._map_side(_side(crop))))

    def evaluation_view(
        self, *, resize: int = 256, crop: int | None = 224
    ) -> Callable[[Any], NDArray[np.uint8]]:
        """The centre crop. Shape: ``[crop, crop, 3]``, uint8."""
        return evaluation_view(resize, _side(crop))

    def evaluation_transform(
        self, *, resize: int = 256, crop: int | None = 224, seed: int = 0
    ) -> Evaluation:
        """Resize, centre crop, normalise; nothing is random. Shape: ``[3, crop, crop]``."""
        return evaluation_transform(self.backbone, resize=resize, crop=_side(crop))

    def training_transform(
        self,
        *,
        resize: int = 256,
        crop: int | None = 224,
        scale: Span = (0.16, 1.0),
        ratio: Span = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> Training:
        """Resize, random crop, flip, normalise. Shape: ``[3, crop, crop]``."""
        return training_transform(
            self.backbone, resize=resize, crop=_side(crop), scale=scale, ratio=ratio, flip=flip
        )

    def trunk(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled nodes and the mean of the map.

        Shape:
            ``[B, 3, h, w]`` to ``[B, N, C]`` and ``[B, C]``.
        """
        check_tensor("views", views, ["B", 3, "h", "w"])
        feature_map = self._feature_map(views)
        nodes = pyramid_pool(feature_map, self.pyramid, include_map=self.include_map)
        if self.global_node is not None:
            return nodes, nodes[:, self.global_node]
        return nodes, feature_map.mean(dim=(2, 3))

    def _map_side(self, crop: int) -> int:
        """How many cells a row of the map of a square view has; the backbone alone can tell."""
        if crop not in self._map_sides:
            training, parameter = self.training, next(self.parameters())
            with torch.no_grad():
                feature_map = self.eval()._feature_map(
                    torch.zeros(1, 3, crop, crop, device=parameter.device, dtype=parameter.dtype)
                )
            self.train(training)
            self._map_sides[crop] = feature_map.shape[3]
        return self._map_sides[crop]

    def _settings(self) -> dict[str, Any]:
        return {"pyramid": list(self.pyramid), "include_map": self.include_map}


def _side(crop: int | None) -> int:
    if crop is None:
        raise ValueError("crop: expected a side in pixels, got None, which only patches can take")
    return crop
