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
  the runs of a Table 8, finished or not; one record of several in a folder:
    emd-retrieval report runs/table8_cub50_frozen
    emd-retrieval report results/cub50_frozen.json
  its charts for a paper, PNG and SVG, as wide as a column:
    emd-retrieval report results/table8_cub50_frozen --charts figures/
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``report`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="one HTML file of a run: tables, curves, the explorer of matches",
        description="Write one self-contained HTML file of what a run left. No ranking and no "
        "match is computed anew, and the page fetches nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder that a command wrote, or a record (.json)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="(RUN/report.html)")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR",
        help="runs of a Table 8 in RUN: adds training curves and results by class",
    )  # fmt: skip
    charts = parser.add_argument_group("charts as files, in place of the page")
    charts.add_argument("--charts", type=Path, metavar="DIR", help="write them here")
    charts.add_argument("--format", metavar="F", help="png, svg or png,svg (png,svg)")
    charts.add_argument("--width", type=float, metavar="IN", help="inches (3.3, a column)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Write the page and say how large it is, or write the charts."""
    from emd_retrieval import workflows
    from emd_retrieval.reports.style import COLUMN

    if options.charts is None:
        for name in ("format", "width"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} goes with --charts")
        page = workflows.write_report(options.folder, options.output, cells=options.runs)
        print(f"written: {page} ({page.stat().st_size / 1e6:.1f} MB)")
        return
    for name in ("output", "runs"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} does not go with --charts")
    formats = options.format or "png,svg"
    files = workflows.write_charts(
        options.folder,
        options.charts,
        formats=[part.strip() for part in formats.split(",")],
        width=COLUMN if options.width is None else options.width,
    )
    if not files:
        print(f"nothing to draw in {options.folder}")
        return
    print(f"written to {options.charts}: {', '.join(file.name for file in files)}")
