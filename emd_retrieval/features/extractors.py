"""Extractors: images to sets of local features, and the linear embedder behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.pyramid import check_pyramid, pyramid_boxes, pyramid_pool


class FCNExtractor(nn.Module):
    """DeepEMD-FCN: the cells of a pooled feature map are the nodes (Section 4.2).

    The embedder is linear, so it commutes with the averages of the pyramid: it is applied to the
    pooled nodes, which are fewer than the cells of the map.

    Args:
        backbone: A dense feature extractor.
        pyramid: Levels of the feature pyramid; the paper's retrieval setting is ``(3, 2, 1)``.
        include_map: Append the cells of the map itself.
        embedding_size: Channels of the linear embedder (the paper's retrieval setting is 128);
            ``None`` for the backbone's own features.

    Shape:
        ``[B, 3, h, w]`` to ``[B, N, D]``.
    """

    name = "fcn"

    def __init__(
        self,
        backbone: Backbone,
        *,
        pyramid: Sequence[int] = (3, 2, 1),
        include_map: bool = False,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = check_pyramid(pyramid, include_map)
        self.include_map = include_map
        self.embedder: nn.Module = nn.Identity()
        self.channels = backbone.channels
        if embedding_size is not None:
            if embedding_size < 1:
                raise ValueError(f"embedding_size: expected 1 or more, got {embedding_size}")
            self.embedder = nn.Linear(backbone.channels, embedding_size)
            self.channels = embedding_size

    @property
    def global_node(self) -> int | None:
        """Index of the 1x1 node, which is the pooled feature; ``None`` if the pyramid has none."""
        if 1 not in self.pyramid:
            return None
        return sum(size * size for size in self.pyramid[: self.pyramid.index(1)])

    def node_boxes(self) -> Tensor | None:
        """Where the nodes lie, as shares of the image; ``None`` where that is not fixed.

        Shape:
            ``[N, 4]``: left, top, right, bottom.
        """
        return None if self.include_map else pyramid_boxes(self.pyramid)

    def forward(self, images: Tensor) -> Tensor:
        """Local features of normalised images. Shape: ``[B, 3, h, w] -> [B, N, D]``."""
        return self.with_global(images)[0]

    def with_global(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Local features and the pooled global vector, from one pass through the backbone.

        Shape:
            ``[B, 3, h, w]`` to ``[B, N, D]`` and ``[B, D]``.
        """
        feature_map = self.backbone(images)
        nodes = self.embedder(pyramid_pool(feature_map, self.pyramid, include_map=self.include_map))
        if self.global_node is not None:
            return nodes, nodes[:, self.global_node]
        return nodes, self.embedder(feature_map.mean(dim=(2, 3)))

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {
            "extractor": self.name,
            **self.backbone.describe(),
            "pyramid": list(self.pyramid),
            "include_map": self.include_map,
            "embedding_size": None if isinstance(self.embedder, nn.Identity) else self.channels,
        }
