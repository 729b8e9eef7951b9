"""``emd-retrieval explain``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from emd_retrieval.cli.options import add_feature_options

EXAMPLES = """examples:
  which part of one bird matches which part of the other:
    emd-retrieval explain a.jpg b.jpg --backbone resnet50 --weights resnet50.safetensors
  by a trained run, as PNG and SVG:
    emd-retrieval explain a.jpg b.jpg --model runs/ms_fcn --format png,svg
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``explain`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="why two images are similar: figures of their match",
        description="Match two images; draw the largest flows, one image rebuilt from parts of the "
        "other (the paper's Figure 6) and all flows (Figure 7).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("query", type=Path, metavar="A", help="an image")
    parser.add_argument("reference", type=Path, metavar="B", help="the image to compare with")
    features = parser.add_argument_group("features")
    add_feature_options(features)
    out = parser.add_argument_group("output")
    out.add_argument("--format", default="png", metavar="F", help="png, svg or png,svg (png)")
    out.add_argument("--output", type=Path, default=Path("runs/explain"), metavar="DIR",
                     help="folder (runs/explain)")  # fmt: skip
    parser.set_defaults(run=partial(run, default=parser.get_default))
    return parser


def run(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Match, draw, say what was written.

    Args:
        options: What the user chose.
        default: Gives an option's value where the user chose nothing.
    """
    from emd_retrieval import workflows
    from emd_retrieval.cli.options import feature_settings, set_threads

    set_threads(options.threads)
    match, files = workflows.explain_images(
        workflows.ExplainImages(
            query=options.query,
            reference=options.reference,
            **feature_settings(options, default),
        ),
        options.output,
        formats=[part.strip() for part in options.format.split(",")],
    )
    print(f"similarity {match.similarity:.3f}")
    print(f"written to {options.output}: {', '.join(file.name for file in files)}")
