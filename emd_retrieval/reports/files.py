"""Figures to files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from emd_retrieval._files import whole_file


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, by the path's ending, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial)
    return Path(path)
