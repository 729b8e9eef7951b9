"""Backbones: dense feature extractors ``[B, 3, h, w] -> [B, D, H, W]``, of timm or our own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from emd_retrieval._checks import check_tensor
from emd_retrieval.features.resnet12 import ResNet12

_OWN: dict[str, Callable[[], nn.Module]] = {
    "resnet12": ResNet12,
    "resnet12_stride8": partial(ResNet12, last_pooling=False),
    "resnet12_stride8_256": partial(ResNet12, (32, 64, 128, 256), last_pooling=False),
}
"""Models that timm does not have."""


class Backbone(nn.Module):
    """A model without its classifier and pooling.

    Build it with :func:`load_backbone`.

    Attributes:
        name: Name of the model.
        layer: ``None`` for the last feature map, or the index of an intermediate one.
        channels: D, the channels of the feature map.
        mean: Input mean for RGB in [0, 1].
        std: Input standard deviation for RGB in [0, 1].
        input_size: Side of the square images it was trained on, in pixels.
    """

    def __init__(self, model: nn.Module, name: str, layer: int | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.name = name
        self.layer = layer
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        self.mean = tuple(config.get("mean") or (0.485, 0.456, 0.406))
        self.std = tuple(config.get("std") or (0.229, 0.224, 0.225))
        self.input_size = int((config.get("input_size") or (3, 224, 224))[-1])
        with torch.no_grad():
            training = model.training
            model.eval()
            probe = self(torch.zeros(1, 3, self.input_size, self.input_size))
            model.train(training)
        if probe.shape[2] * probe.shape[3] == 1:
            raise self._no_map()
        self.channels = int(probe.shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps of normalised images. Shape: ``[B, 3, h, w] -> [B, D, H, W]``.

        Raises:
            ValueError: If the shape does not fit, or the model takes images of another size only.
        """
        check_tensor("images", images, ["B", 3, "h", "w"])
        try:
            return self._feature_map(images)
        except AssertionError as error:
            # timm's transformers check their input size so.
            height, width = images.shape[-2:]
            raise ValueError(
                f"backbone: {self.name} does not take images of {height} x {width} pixels "
                f"({_first_line(error)}); it was trained on {self.input_size} x {self.input_size}"
            ) from error

    def _feature_map(self, images: Tensor) -> Tensor:
        if self.layer is not None:
            maps: list[Tensor] = self.model.forward_intermediates(
                images, indices=[self.layer], intermediates_only=True, output_fmt="NCHW"
            )
            return maps[0]
        features = self.model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise self._no_map()
        if features.ndim == 3:
            feature_map = _tokens_to_map(features, self.model, images)
            if feature_map is None:
                raise self._no_map()
            return feature_map
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features

    def _no_map(self) -> ValueError:
        """CoaT, CrossViT, PiT and VOLO end in class tokens, or in several sets of tokens."""
        way_out = "choose another model"
        if self.layer is None and hasattr(self.model, "forward_intermediates"):
            way_out = "take its last intermediate one: layer=-1 (--layer -1)"
        return ValueError(f"backbone: the output of {self.name} is no feature map; {way_out}")

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {"backbone": self.name, "layer": self.layer, "channels": self.channels}


def load_backbone(
    name: str = "resnet50",
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    layer: int | None = None,
) -> Backbone:
    """Load a timm model, or ResNet-12, as a dense feature extractor.

    Args:
        name: A timm model, with or without a weights tag. timm's default for ``resnet50`` is a
            later training recipe; ``resnet50.tv_in1k`` has the weights of the paper's time. Or
            ``resnet12``, the few-shot backbone, and ``resnet12_stride8``, the same without its last
            pooling, for small images (:class:`~emd_retrieval.features.resnet12.ResNet12`).
        weights: A local ``.safetensors``, ``.pth`` or ``.pt`` file in timm's names; only tensors
            are read from it. A classifier in it is left out. For ``resnet12`` the reference code's
            checkpoints fit.
        pretrained: Without ``weights``, whether to fetch timm's weights from its hub; ``False``
            gives random ones.
        layer: Index of an intermediate feature map, negative from the end; the last one by default.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        ValueError: If there is no such model, the model has no such layer or no feature map, or the
            weights do not fit.
        FileNotFoundError: If ``weights`` is not a file.
        RuntimeError: If the hub cannot be reached.
    """
    _check_name(name)
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"weights: no file {str(weights)!r}")
    if name in _OWN and pretrained and weights is None:
        raise ValueError(
            f"backbone: no hub has weights of {name!r}; pass a file: weights=FILE "
            "(--weights FILE), or pretrained=False for random ones"
        )
    try:
        # The pooling stays the model's own: some transformers name their last norm after it, so
        # that without it weights would not fit (or, from the hub, be left out without a word).
        model = (
            _OWN[name]()
            if name in _OWN
            else timm.create_model(name, pretrained=pretrained and weights is None, num_classes=0)
        )
    except (OSError, RuntimeError) as error:
        if weights is not None or not pretrained:
            raise
        raise RuntimeError(
            f"backbone: the weights of {name!r} could not be fetched from timm's hub "
            f"({_first_line(error)}). Pass a local file instead: weights=FILE (--weights FILE)"
        ) from error
    if weights is not None:
        _load_weights(model, name, Path(weights))
    if layer is not None:
        _check_layer(model, name, layer)
    return Backbone(model, name, layer).eval()


def _check_name(name: str) -> None:
    if name in _OWN:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, [*_OWN, *timm.list_models()], n=3)
        hint = f"; nearest names: {', '.join(near)}" if near else ""
        raise ValueError(f"backbone: expected a model of timm, got {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True)) or "none"
        raise ValueError(
            f"backbone: {architecture!r} has no weights {tag!r} in timm; it has: {tags}"
        ) from error


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    state = read_weights(path)
    if isinstance(model, ResNet12):
        state = model.own_names(state)
    own = model.state_dict()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    heads = tuple(f"{head.split('.')[0]}." for head in names)
    extra = sorted(k for k in state if k not in own and not k.startswith(heads))
    missing = sorted(k for k in own if k not in state)
    shapes = sorted(k for k in own if k in state and own[k].shape != state[k].shape)
    if extra or missing or shapes:
        problems = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for keys, what in (
                (missing, "missing"),
                (extra, "unknown"),
                (shapes, "of another shape"),
            )
            if keys
        ]
        raise ValueError(
            f"weights: {path.name} does not fit {name!r}: {'; '.join(problems)}. "
            "It must hold the state of that model, in the names it has in timm or here"
        )
    model.load_state_dict({k: v for k, v in state.items() if k in own})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, tensors only; no code in it is run.

    Raises:
        ValueError: If the file is not a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights: {path.name} is not a readable weights file ({_first_line(error)})"
        ) from error
    if isinstance(state, Mapping):
        for key in ("state_dict", "params"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights: {path.name} holds no state dict (names to tensors)")
    return dict(state)


def _check_layer(model: Any, name: str, layer: int) -> None:
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"layer: {name!r} offers no intermediate feature maps")
    count = len(model.feature_info) if hasattr(model, "feature_info") else len(model.blocks)
    if not -count <= layer < count:
        raise ValueError(f"layer: {name!r} has feature maps 0 to {count - 1}, got {layer}")


def _tokens_to_map(tokens: Tensor, model: nn.Module, images: Tensor) -> Tensor | None:
    """Transformer tokens without the class and register ones, back on their grid if they form one.

    Where a model does not tell its grid or its class tokens, a number of tokens that is no square
    says that there is no such grid.
    """
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    cells = tokens[:, prefix:]
    patch = getattr(model, "patch_embed", None)
    if patch is not None and hasattr(patch, "dynamic_feat_size"):
        height, width = patch.dynamic_feat_size(images.shape[-2:])
    else:
        height = width = math.isqrt(cells.shape[1])
    if height * width != cells.shape[1]:
        return None
    return cells.mT.reshape(len(cells), cells.shape[2], height, width)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
