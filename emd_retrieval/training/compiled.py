"""A frozen trunk as compiled code: the same features up to rounding, in less time on a CPU.

Most of a small network's time on a CPU goes into batch norms and activations that each pass through
memory; ``torch.compile`` folds them into their convolutions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emd_retrieval.features import Extractor

# What one pass of a CPU takes at once: beyond it activations leave the caches, and every layer
# waits for memory. Eight images of 224 x 224 pixels.
_PIXELS_AT_ONCE = 8 * 224 * 224


def compile_trunk(extractor: Extractor) -> Extractor:
    """A copy of an extractor for inference, its backbone compiled by ``torch.compile``.

    The first images of each size wait for the compiler, some ten seconds to a minute; that pays
    from about a thousand images on. Its C++ compiler (on a CPU) must be installed.

    Args:
        extractor: Stays as it is.

    Returns:
        The copy, in evaluation mode; no gradients go through it.
    """
    compiled = copy.deepcopy(extractor).eval().requires_grad_(False)
    # As an attribute of the instance: all else of the backbone, its name for one, stays in reach.
    object.__setattr__(compiled.backbone, "forward", _Compiled(compiled.backbone))
    return compiled


class _Compiled:
    """Runs a backbone on parts of one size, so that one compiled program serves all batches."""

    def __init__(self, backbone: nn.Module) -> None:
        self.device = next(backbone.parameters()).device
        options: Any = {"freezing": True} if self.device.type == "cpu" else None
        self.program: Any = torch.compile(backbone.forward, dynamic=False, options=options)

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = max(1, _PIXELS_AT_ONCE // (height * width))
        if self.device.type != "cpu":
            size = len(images)
        maps = [self._part(part, size) for part in images.split(size)]
        return torch.cat(maps)

    def _part(self, images: Tensor, size: int) -> Tensor:
        missing = size - len(images)
        if missing:
            images = F.pad(images, (0,) * 7 + (missing,))
        images = images.contiguous(memory_format=torch.channels_last)
        try:
            feature_map: Tensor = self.program(images)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise RuntimeError(
                f"compile: torch.compile failed on this machine ({_first_line(error)}); a CPU "
                "needs a C++ compiler. Go on without compiling"
            ) from error
        return feature_map[: size - missing]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
