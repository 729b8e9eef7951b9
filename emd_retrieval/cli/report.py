"""``emd-retrieval report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  a page of what a run measured, to open in any browser:
    emd-retrieval report runs/evaluate
  with the explorer of matches, which the run must keep pictures and flows for:
    emd-retrieval evaluate --data CUB_200_2011 --classes 101-200 --report
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``report`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="one HTML file of a run: tables, curves, the explorer of matches",
        description="Write one self-contained HTML file of a run's folder. Nothing is computed "
        "anew, and the page fetches nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder that a command wrote")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(RUN/report.html)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Write the page and say how large it is."""
    from emd_retrieval import workflows

    page = workflows.write_report(options.folder, options.output)
    print(f"written: {page} ({page.stat().st_size / 1e6:.1f} MB)")
