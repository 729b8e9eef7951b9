"""``emd-retrieval table8``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emd_retrieval.cli.options import add_report_option
from emd_retrieval.cli.train import add_compile, add_machine, machine_of

EXAMPLES = """examples:
  the paper's table on the paper's data (resnet50.tv_in1k from timm's hub, a GPU):
    emd-retrieval table8 --recipes recipes/retrieval/cub200_resnet50 --data CUB_200_2011 \\
        --output results/table8_cub200
  classes 1-50 with a frozen trunk, three seeds, with the controls:
    emd-retrieval table8 --recipes recipes/retrieval/cub50_efficientnet_lite0 \\
        --data CUB_200_2011 --weights tf_efficientnet_lite0.safetensors --controls \\
        --output results/table8_cub50_frozen
  two losses, Raw and FCN, one seed, fewer steps:
    emd-retrieval table8 optimization.steps=100 --losses contrastive,multi_similarity \\
        --methods raw,fcn --seeds 1 --recipes recipes/retrieval/cub50_efficientnet_lite0 \\
        --data CUB_200_2011 --weights tf_efficientnet_lite0.safetensors --output results/trial
A killed table goes on where it was: give the same command again.
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``table8`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "table8",
        help="the paper's Table 8: six losses, Raw against sets",
        description="Run the cells of Table 8 that are missing, and write the table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="in place of every recipe's settings"
    )
    parser.add_argument("--recipes", type=Path, required=True, metavar="DIR", help="one a loss")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the table")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="of the cells (runs/ and the output's name)"
    )
    cells = parser.add_argument_group("cells")
    cells.add_argument("--losses", metavar="NAMES", help="comma-separated (all with a recipe)")
    cells.add_argument("--methods", default="raw,fcn,grid,sampling", metavar="NAMES",
                       help="(raw,fcn,grid,sampling)")  # fmt: skip
    cells.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each cell (3)")
    cells.add_argument(
        "--controls", nargs="?", const="mean,uniform,dense,detached,evaluation", default="",
        metavar="NAMES", help="all of mean,uniform,dense,detached,evaluation, or some (none)",
    )  # fmt: skip
    add_report_option(parser)
    add_machine(parser)
    add_compile(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run what is missing, print the table.

    Raises:
        RuntimeError: If cells failed; the table of the others is written and printed first.
    """
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    runs = options.runs or Path("runs") / options.output.resolve().name
    record, failures = workflows.run_table8(
        workflows.Table8(
            recipes=options.recipes,
            runs=runs,
            data=options.data,
            losses=_names(options.losses) if options.losses is not None else None,
            methods=_names(options.methods),
            controls=_names(options.controls),
            seeds=options.seeds,
            overrides=options.overrides,
            machine=machine_of(options),
            report=options.report,
            seed=options.seed,
        ),
        options.output,
    )
    print_record(record, options.output)
    if failures:
        cell, why = next(iter(failures.items()))
        raise RuntimeError(
            f"{len(failures)} cells failed and are not in the table, the first, {cell}: {why}"
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
