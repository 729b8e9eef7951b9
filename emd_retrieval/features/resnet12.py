"""ResNet-12, the backbone of the few-shot literature; timm has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

WIDTHS = (64, 160, 320, 640)


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, each followed by 2x2 max pooling.

    Widths are those of the reference code, whose last is 640 where the paper says 512. It speaks
    timm's ``forward_features``; parameters are named as in the reference code, whose checkpoints
    fit.

    Args:
        widths: Channels of the four blocks.
        last_pooling: Pool after the last block. Without it images of 40 pixels give the 5 x 5 map
            that 84 pixels give with it.

    Attributes:
        stride: Pixels from one cell of the map to the next: 16, or 8 without the last pooling.

    Shape:
        ``[B, 3, h, w]`` to ``[B, widths[-1], h // stride, w // stride]``.
    """

    pretrained_cfg: ClassVar[dict[str, Any]] = {
        "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
        "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
        "input_size": (3, 84, 84),
        "classifier": "fc",
    }

    def __init__(self, widths: Sequence[int] = WIDTHS, *, last_pooling: bool = True) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(_Block(3, widths[0]))
        self.layer2 = nn.Sequential(_Block(widths[0], widths[1]))
        self.layer3 = nn.Sequential(_Block(widths[1], widths[2]))
        self.layer4 = nn.Sequential(_Block(widths[2], widths[3], pooling=last_pooling))
        self.stride = 16 if last_pooling else 8
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu"
                )

    def forward_features(self, images: Tensor) -> Tensor:
        """Feature maps. Shape: ``[B, 3, h, w] -> [B, D, H, W]``."""
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(images))))
        return features

    @staticmethod
    def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict without the prefixes that wrappers and the reference code's trainer add."""
        return {
            name.removeprefix("module.").removeprefix("encoder."): state[name] for name in state
        }


class _Block(nn.Module):
    def __init__(self, before: int, after: int, *, pooling: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv3 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample = nn.Sequential(
            nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
        )
        self.activation = nn.LeakyReLU(0.1, inplace=True)
        self.pooling: nn.Module = nn.MaxPool2d(2) if pooling else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        inner = self.activation(self.bn1(self.conv1(features)))
        inner = self.activation(self.bn2(self.conv2(inner)))
        inner = self.bn3(self.conv3(inner)) + self.downsample(features)
        output: Tensor = self.pooling(self.activation(inner))
        return output
