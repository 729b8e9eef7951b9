"""Depthwise convolutions of a trunk that is trained on a CPU in bfloat16.

oneDNN has no fast bfloat16 code for two of their gradients: that of the images where the stride is
above 1, and that of kernels of 5 x 5. In float32 both are 3 to 5 times as fast; with that a whole
step of EfficientNet-Lite0 takes .6 of the time. The result is the same up to bfloat16's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_IMAGES, _KERNELS = [True, False, False], [False, True, False]
_SMALL_KERNEL = 3


class DepthwiseInFloat32(TorchFunctionMode):
    """Within it, those gradients are computed in float32; all else is as it was.

    It acts under bfloat16 autocast on the CPU, and nowhere else.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _in_bfloat16(args[0]):
            images, kernels, bias, stride, padding, dilation, groups = args
            depthwise = groups == images.shape[1] == kernels.shape[0] > 1
            if depthwise and not isinstance(padding, str) and _slow(kernels, stride):
                settings = [_pair(value) for value in (stride, padding, dilation)]
                maps = _Depthwise.apply(images, kernels, *settings)
                return maps if bias is None else maps + bias.to(maps.dtype)[:, None, None]
        return func(*args, **(kwargs or {}))


class _Depthwise(torch.autograd.Function):
    """``torch.conv2d`` in bfloat16, a kernel a channel, each gradient in its faster precision."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        kernels: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> Tensor:
        """Shapes: images [B, C, H, W], kernels [C, 1, k, k]."""
        ctx.dtypes = images.dtype, kernels.dtype
        images, kernels = images.bfloat16(), kernels.bfloat16()
        ctx.save_for_backward(images, kernels)
        ctx.settings = stride, padding, dilation
        with torch.autocast("cpu", enabled=False):
            return torch.conv2d(images, kernels, None, stride, padding, dilation, len(kernels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Both gradients, in the dtypes that came in."""
        images, kernels = ctx.saved_tensors
        stride, padding, dilation = ctx.settings

        def of(which: list[bool], in_float32: bool) -> Tensor:
            parts = [gradient, images, kernels]
            if in_float32:
                parts = [part.float() for part in parts]
            found = torch.ops.aten.convolution_backward(
                *parts, None, stride, padding, dilation, False, [0, 0], len(kernels), which
            )
            wanted: Tensor = found[which.index(True)]
            return wanted

        of_images = of_kernels = None
        if ctx.needs_input_grad[0]:
            of_images = of(_IMAGES, _strided(stride)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_kernels = of(_KERNELS, _large(kernels)).to(ctx.dtypes[1])
        return of_images, of_kernels, None, None, None


def _in_bfloat16(images: Tensor) -> bool:
    return (
        images.device.type == "cpu"
        and images.ndim == 4
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and torch.is_grad_enabled()
    )


def _slow(kernels: Tensor, stride: Any) -> bool:
    return _large(kernels) or _strided(_pair(stride))


def _large(kernels: Tensor) -> bool:
    return max(kernels.shape[2:]) > _SMALL_KERNEL


def _strided(stride: list[int]) -> bool:
    return max(stride) > 1


def _pair(value: Any) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * (2 // len(found))
