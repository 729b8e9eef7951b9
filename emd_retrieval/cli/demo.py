"""``emd-retrieval demo``."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``demo`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="train and evaluate a small case"
    )
    return parser
