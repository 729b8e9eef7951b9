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
  an episode that a few-shot test recorded (fewshot test --record 0):
    emd-retrieval explain --episode runs/fcn/episode_5way_1shot_0.npz
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
    parser.add_argument("query", type=Path, metavar="A", nargs="?", help="an image")
    parser.add_argument(
        "reference", type=Path, metavar="B", nargs="?", help="the image to compare with"
    )
    episode = parser.add_argument_group("in place of two images")
    episode.add_argument(
        "--episode", type=Path, metavar="FILE", help="a recorded episode: queries and their nearest"
    )
    episode.add_argument("--rows", type=int, metavar="N", help="queries of it, at most (3)")
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
    formats = [part.strip() for part in options.format.split(",")]
    if options.episode is not None:
        _refuse_beside_an_episode(options, default)
        matches, files = workflows.explain_episode(
            options.episode,
            options.output,
            formats=formats,
            rows=3 if options.rows is None else options.rows,
        )
        for match in matches:
            print(f"{match.title}: similarity {match.similarity:.3f}")
        print(f"written to {options.output}: {', '.join(file.name for file in files)}")
        return
    if options.rows is not None:
        raise ValueError("--rows goes with --episode")
    if options.query is None or options.reference is None:
        raise ValueError("expected two images, A and B, or --episode FILE")
    match, files = workflows.explain_images(
        workflows.ExplainImages(
            query=options.query,
            reference=options.reference,
            **feature_settings(options, default),
        ),
        options.output,
        formats=formats,
    )
    print(f"similarity {match.similarity:.3f}")
    print(f"written to {options.output}: {', '.join(file.name for file in files)}")


def _refuse_beside_an_episode(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """A recorded episode holds pictures and matches; nothing is extracted."""
    own = {"episode", "rows", "format", "output", "run", "seed", "threads", "quiet", "debug"}
    for name, value in vars(options).items():
        if name in own or value == default(name):
            continue
        what = "an image" if name in ("query", "reference") else f"--{name.replace('_', '-')}"
        raise ValueError(f"{what} does not go with --episode, which holds its own matches")
