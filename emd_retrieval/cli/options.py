"""How commands read what a user typed: devices, sizes, threads, options that go together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EXTRACTOR_OPTIONS = {
    "pyramid": ("fcn",),
    "include_map": ("fcn",),
    "grid": ("grid",),
    "context": ("grid",),
    "patches": ("sampling",),
    "patch_size": ("grid", "sampling"),
}
_OF_A_MODEL = (
    "backbone", "layer", "extractor", *_EXTRACTOR_OPTIONS, "resize", "crop", "ground_cost",
    "node_weights", "weight_floor", "solver",
)  # fmt: skip


def add_extractor_options(group: Any) -> None:
    """What turns images into nodes: backbone, extractor, sizes."""
    group.add_argument("--backbone", default="resnet50", metavar="NAME", help="timm (resnet50)")
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="local file; timm's hub without"
    )
    group.add_argument("--layer", type=int, metavar="I", help="intermediate feature map (last)")
    group.add_argument(
        "--extractor", default="fcn", choices=["fcn", "grid", "sampling"], help="nodes (fcn)"
    )
    group.add_argument("--pyramid", default="3,2,1", metavar="SIZES", help="fcn: levels (3,2,1)")
    group.add_argument("--grid", default="3,2", metavar="SIZES", help="grid: levels (3,2)")
    group.add_argument("--patches", type=int, default=25, metavar="P", help="sampling: (25)")
    group.add_argument(
        "--patch-size", type=int, metavar="PX", help="grid, sampling: side (the backbone's own)"
    )
    group.add_argument("--resize", type=int, default=256, metavar="PX", help="short side (256)")
    group.add_argument("--crop", type=int, default=224, metavar="PX", help="centre crop (224)")


def check_extractor_options(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Refuse what the chosen extractor, or the trained run, does not read."""
    if options.model is None:
        _refuse_other_extractors(options, default)
    else:
        _refuse_beside_a_model(options, default)


def torch_device(name: str | None) -> str:
    """A device that can be used here; a GPU where there is one and none is named."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} cannot be used here ({reason})") from error
    return name


def sizes(option: str, text: str) -> tuple[int, ...]:
    """Comma-separated sizes, as in 3,2,1."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option}: expected sizes as in 3,2,1, got {text!r}")
    return tuple(int(part) for part in parts)


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads for torch and the transport solver; all by default."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads: expected 1 or more, got {threads}")
    torch.set_num_threads(threads)


def _refuse_other_extractors(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """An option that the chosen extractor does not read would change nothing, without a word."""
    for name, readers in _EXTRACTOR_OPTIONS.items():
        if options.extractor not in readers and _chosen(options, name, default):
            raise ValueError(
                f"--{name.replace('_', '-')} goes with --extractor {' or '.join(readers)}, "
                f"not with {options.extractor}"
            )


def _refuse_beside_a_model(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """A trained run knows its backbone, extractor, views and matching."""
    for name in _OF_A_MODEL:
        if _chosen(options, name, default):
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with --model, whose recipe says it already"
            )


def _chosen(options: argparse.Namespace, name: str, default: Callable[[str], Any]) -> bool:
    return hasattr(options, name) and getattr(options, name) != default(name)
