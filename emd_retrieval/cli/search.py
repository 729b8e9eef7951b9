"""``emd-retrieval search``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emd_retrieval.cli.rerank import add_answer_options, add_search_options, search_settings

EXAMPLES = """examples:
  one image, with a picture of the answer:
    emd-retrieval search wren.jpg --store birds.store --weights resnet50.safetensors \\
        --images photos/
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``search`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "search",
        help="one image among those of a store",
        description="Search for one image; write the answer as a table and a picture.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the image to search for")
    add_search_options(parser)
    add_answer_options(parser)
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the store's images, to draw answers"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/search"), metavar="DIR", help="(runs/search)"
    )
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Search, write the answer, print it."""
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    settings = workflows.SearchImage(
        **search_settings(options),
        queries=options.image,
        shortlist=options.shortlist,
        k=options.k,
        alpha=options.alpha,
        images=options.images,
    )
    record, _ = workflows.search_image(settings, options.output)
    print_record(record, options.output)
