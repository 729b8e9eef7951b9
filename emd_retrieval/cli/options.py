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


def add_feature_options(group: Any) -> None:
    """What turns images into nodes: a trained run, or backbone, extractor and sizes."""
    add = group.add_argument
    add(
        "--model", type=Path, metavar="RUN", help="a trained run (emd-retrieval train), no backbone"
    )
    add("--backbone", default="resnet50", metavar="NAME", help="timm (resnet50)")
    add("--weights", type=Path, metavar="FILE", help="local file; timm's hub without")
    add("--layer", type=int, metavar="I", help="intermediate feature map (last)")
    add("--extractor", default="fcn", choices=["fcn", "grid", "sampling"], help="nodes (fcn)")
    add("--pyramid", default="3,2,1", metavar="SIZES", help="fcn: levels (3,2,1)")
    add("--include-map", action="store_true", help="fcn: append the map's cells")
    add("--grid", default="3,2", metavar="SIZES", help="grid: levels (3,2)")
    add("--context", type=float, default=2.0, metavar="X", help="grid: enlarge cells (2)")
    add("--patches", type=int, default=25, metavar="P", help="sampling: (25)")
    add("--patch-size", type=int, metavar="PX", help="grid, sampling: side (the backbone's own)")
    add("--resize", type=int, default=256, metavar="PX", help="short side (256)")
    add("--crop", type=int, default=224, metavar="PX", help="centre crop (224)")
    add("--device", default=None, help="torch device (cuda where there is one)")


def feature_settings(
    options: argparse.Namespace, default: Callable[[str], Any], *, device: str | None = None
) -> dict[str, Any]:
    """What :func:`add_feature_options` read, for :class:`emd_retrieval.workflows.FeatureSettings`.

    Args:
        options: What the user chose.
        default: Gives an option's value where the user chose nothing.
        device: In the place of the user's.

    Raises:
        ValueError: If the chosen extractor, or the trained run, does not read an option.
    """
    if options.model is None:
        _refuse_other_extractors(options, default)
    else:
        _refuse_beside_a_model(options, default)
    as_typed = ("model", "backbone", "weights", "layer", "extractor", "include_map", "context",
                "patches", "patch_size", "resize", "crop", "seed")  # fmt: skip
    return {
        **{name: getattr(options, name) for name in as_typed},
        "pyramid": sizes("--pyramid", options.pyramid),
        "grid": sizes("--grid", options.grid),
        "device": torch_device(device or options.device),
    }


def add_work_options(group: Any) -> None:
    """How the images of a folder are worked through."""
    add = group.add_argument
    add("--batch-size", type=int, default=32, metavar="N", help="(32)")
    add("--bf16", action="store_true", help="run the backbone in bfloat16")
    add("--workers", type=int, metavar="N", help="decoding processes (by cores)")
    add("--skip-errors", action="store_true", help="leave unreadable images out, and list them")


def work_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_work_options` read, in the names of the workflows' settings."""
    from emd_retrieval.features.extraction import default_workers

    return {
        "batch_size": options.batch_size,
        "bf16": options.bf16,
        "num_workers": default_workers() if options.workers is None else options.workers,
        "skip_errors": options.skip_errors,
    }


def add_report_option(group: Any) -> None:
    """The page of the run, with queries to explore."""
    group.add_argument(
        "--report", type=int, nargs="?", const=200, metavar="N",
        help="also write report.html, with N queries to explore (200)",
    )  # fmt: skip


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
