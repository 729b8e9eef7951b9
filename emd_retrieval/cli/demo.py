"""``emd-retrieval demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emd_retrieval.cli.options import add_report_option

EXAMPLES = """examples:
  train and evaluate, about two minutes on two cores:
    emd-retrieval demo
  the same with a page to look at: runs/demo/report.html
    emd-retrieval demo --report
  only the drawn birds, as class folders for other tools:
    emd-retrieval demo --export birds/
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``demo`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="train and evaluate a small case, no data needed",
        description="Draw birds, train Raw and DeepEMD from random weights on some species, and "
        "retrieve species that neither has seen.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each method")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="folder for table and figures (runs/demo)")  # fmt: skip
    add_report_option(parser)
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the birds here and stop")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the demo, or write its images."""
    from dataclasses import replace

    from emd_retrieval import workflows
    from emd_retrieval.cli.options import set_threads
    from emd_retrieval.cli.printing import print_record
    from emd_retrieval.datasets import demo_birds, save_image_folder

    set_threads(options.threads)
    settings = workflows.Demo(seed=options.seed)
    if options.export is not None:
        species = settings.train_species + settings.test_species
        birds = demo_birds(species, settings.test_images, size=128, seed=options.seed)
        save_image_folder(birds, options.export)
        print(f"{len(birds)} images of {species} species written to {options.export}")
        return
    if options.steps is not None:
        settings = replace(settings, steps=options.steps)
    record, _ = workflows.run_demo(
        settings,
        options.output,
        report=options.report,
        say=lambda line: print(line, flush=True),
    )
    print_record(record, options.output)
