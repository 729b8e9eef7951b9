"""A small residual network that trains from random weights in a minute on a CPU (demo, tests)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from emd_retrieval.features.backbones import Backbone


class SmallResNet(nn.Module):
    """A strided stem and one residual block a width, for images of some 64 pixels.

    It speaks timm's ``forward_features``, so that :class:`Backbone` takes it like any other model.

    Args:
        widths: Channels of the stem and of each block; every block after the first halves the side.

    Shape:
        ``[B, 3, h, w]`` to ``[B, widths[-1], h / 8, w / 8]`` for four widths.
    """

    pretrained_cfg: ClassVar[dict[str, Any]] = {
        "mean": (0.47,) * 3,
        "std": (0.235,) * 3,
        "input_size": (3, 64, 64),
    }

    def __init__(self, widths: Sequence[int] = (16, 24, 48, 96)) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths: expected two or more positive numbers, got {list(widths)}")
        layers: list[nn.Module] = [_convolution(3, widths[0], 5, 2), nn.ReLU(inplace=True)]
        for place, (before, after) in enumerate(pairwise(widths)):
            layers.append(_ResidualBlock(before, after, stride=1 if place == 0 else 2))
        self.layers = nn.Sequential(*layers)

    def forward_features(self, images: Tensor) -> Tensor:
        """Feature maps. Shape: ``[B, 3, h, w] -> [B, D, H, W]``."""
        features: Tensor = self.layers(images)
        return features


def small_backbone(widths: Sequence[int] = (16, 24, 48, 96)) -> Backbone:
    """A :class:`SmallResNet` with random weights, as a backbone."""
    name = "small_resnet_" + "_".join(map(str, widths))
    return Backbone(SmallResNet(widths), name)


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, 3, stride)
        self.second = _convolution(after, after, 3, 1)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = _convolution(before, after, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.second(self.relu(self.first(features)))
        output: Tensor = self.relu(inner + self.shortcut(features))
        return output


def _convolution(before: int, after: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))
