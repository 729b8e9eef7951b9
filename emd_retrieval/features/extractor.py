"""What every extractor is: a backbone, a linear embedder, and the way from an image to views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.transforms import Evaluation, Span, Training


class Extractor(nn.Module, ABC):
    """Images to sets of local features (Section 4.2).

    A subclass says how an image becomes views (the two transforms), how views become features (
    :meth:`trunk`), how many nodes that gives and where they lie. The embedder is linear, so it
    commutes with averages: ``embed`` of what ``trunk`` gives is what ``with_global`` gives, and the
    features of a frozen trunk can be kept and embedded anew at every step.

    Args:
        backbone: A dense feature extractor.
        embedding_size: Channels of the linear embedder (the paper's retrieval setting is 128);
            ``None`` for the backbone's own features.

    Attributes:
        backbone: The backbone; its ``channels`` are the C of :meth:`trunk`.
        embedder: ``nn.Linear``, or ``nn.Identity`` without ``embedding_size``.
        channels: D, the channels of a node.
        name: What the extractor is called in settings and records.

    Shape:
        Views, one or several an image, to ``[B, N, D]``.
    """

    name: ClassVar[str]

    def __init__(self, backbone: Backbone, *, embedding_size: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.embedder: nn.Module = nn.Identity()
        self.channels = backbone.channels
        if embedding_size is not None:
            if embedding_size < 1:
                raise ValueError(f"embedding_size: expected 1 or more, got {embedding_size}")
            self.embedder = nn.Linear(backbone.channels, embedding_size)
            self.channels = embedding_size

    @property
    @abstractmethod
    def num_nodes(self) -> int | None:
        """N; ``None`` where it depends on the size of the images."""

    @property
    def global_node(self) -> int | None:
        """Index of the node that is the pooled global feature; ``None`` where there is none."""
        return None

    @abstractmethod
    def node_boxes(
        self, image: Any = None, *, resize: int = 256, crop: int | None = 224, seed: int = 0
    ) -> Tensor | None:
        """Where the nodes lie in evaluation, as shares of :meth:`evaluation_view`.

        Args:
            image: The PIL image; only random patches differ from image to image.
            resize: As in :meth:`evaluation_transform`.
            crop: As in :meth:`evaluation_transform`.
            seed: As in :meth:`evaluation_transform`.

        Returns:
            Left, top, right, bottom; ``None`` where it cannot be told. Shape: ``[N, 4]``.
        """

    @abstractmethod
    def evaluation_view(
        self, *, resize: int = 256, crop: int | None = 224
    ) -> Callable[[Any], NDArray[np.uint8]]:
        """The part of a PIL image that is seen in evaluation, as pixels for a picture.

        Returns:
            A function of a PIL image. Shape of its result: ``[h, w, 3]``, uint8.
        """

    @abstractmethod
    def evaluation_transform(
        self, *, resize: int = 256, crop: int | None = 224, seed: int = 0
    ) -> Evaluation:
        """The views of a PIL image for evaluation, normalised: a pure function of its pixels.

        Args:
            resize: Short side to which the image is resized, in pixels.
            crop: Side of the centre square that is kept of it, in pixels. ``None``, for patches
                only: the whole image.
            seed: Seed of random patches, together with a checksum of the pixels: an image has the
                same patches in any collection and process.

        Raises:
            ValueError: If the sizes do not fit.
        """

    @abstractmethod
    def training_transform(
        self,
        *,
        resize: int = 256,
        crop: int | None = 224,
        scale: Span = (0.16, 1.0),
        ratio: Span = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> Training:
        """The views of a PIL image for training, of the same shapes; a generator draws them.

        Args:
            resize: As in :meth:`evaluation_transform`.
            crop: Side of a whole-image view; for patches as in :meth:`evaluation_transform`.
            scale: Least and largest area of a whole-image view, as shares of the image.
            ratio: Least and largest width over height of a whole-image view.
            flip: Mirror every second view, left for right.

        Raises:
            ValueError: If a size is not positive, or a range is none.
        """

    @abstractmethod
    def trunk(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's features before the embedder, with C = ``backbone.channels``.

        Shape:
            Views to nodes ``[B, N, C]`` and pooled ``[B, C]``.
        """

    def embed(self, features: Tensor) -> Tensor:
        """The embedder, on nodes or pooled vectors. Shape: ``[..., C] -> [..., D]``."""
        embedded: Tensor = self.embedder(features)
        return embedded

    def forward(self, views: Tensor) -> Tensor:
        """Local features of normalised views. Shape: views to ``[B, N, D]``."""
        return self.embed(self.trunk(views)[0])

    def with_global(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Local features and the pooled global vector, from one pass through the backbone.

        Shape:
            Views to ``[B, N, D]`` and ``[B, D]``.
        """
        nodes, pooled = self.trunk(views)
        return self.embed(nodes), self.embed(pooled)

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {
            "extractor": self.name,
            **self.backbone.describe(),
            **self._settings(),
            "embedding_size": None if isinstance(self.embedder, nn.Identity) else self.channels,
        }

    def _settings(self) -> dict[str, Any]:
        """What a subclass has to tell beyond backbone and embedder."""
        return {}

    def _feature_map(self, images: Tensor) -> Tensor:
        """Shape: ``[B, 3, h, w] -> [B, C, H, W]``."""
        # Convolutions are fastest in this layout; patches, being 5-D, cannot arrive in it.
        feature_map: Tensor = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return feature_map
