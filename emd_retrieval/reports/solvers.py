"""Solver speed: time a transportation problem against its size."""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from emd_retrieval.reports.style import (
    CHART,
    PAGE,
    is_narrow,
    legend_above,
    line_style,
    number_ticks,
    panels,
)

_NAMES = {"opencv": "OpenCV cv2.EMD", "POT emd2": "POT ot.emd2", "POT emd_c": "POT emd_c"}
_OURS = "simplex"


@rc_context(CHART)
def solvers_figure(table: pd.DataFrame, *, width: float = PAGE) -> Figure:
    """Microseconds a problem against the number of nodes a side, a line a solver.

    Of several instruction sets of the simplex the first is drawn, which is the widest.

    Args:
        table: What ``benchmarks/transport.py`` records: ``size`` (``"25x25"``), ``solver`` and one
            or more columns ``us, ...``, of which the first is drawn.
        width: In inches.

    Raises:
        ValueError: If a column is missing, or no problem has as many nodes on both sides.
    """
    times = [str(name) for name in table.columns if str(name).startswith("us")]
    if not times or not {"size", "solver"} <= set(table.columns):
        raise ValueError(
            f"table: expected columns size, solver and 'us, ...', got {list(table.columns)}"
        )
    sides = table["size"].str.extract(r"^(\d+)x(\d+)$").astype(float)
    square = table.assign(nodes=sides[0])[sides[0] == sides[1]]
    if not len(square):
        raise ValueError(f"table: expected sizes as in 25x25, got {sorted(set(table['size']))}")
    names = list(dict.fromkeys(square["solver"]))
    own = next((name for name in names if name.startswith(_OURS)), None)
    shown = [name for name in names if not name.startswith(_OURS) or name == own]
    # Ours first: it has the first colour in every figure.
    shown.sort(key=lambda name: name != own)
    figure, (axes,) = panels(1, width, 2.9 if is_narrow(width) else 2.7)
    for number, name in enumerate(shown):
        part = square[square["solver"] == name].sort_values("nodes")
        label = "simplex (this package)" if name == own else _NAMES.get(name, name)
        axes.plot(part["nodes"], part[times[0]], label=label, zorder=3 if name == own else 2,
                  linewidth=2.0 if name == own else 1.2, **line_style(number))  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="nodes a side of the problem",
             ylabel=f"µs a problem, {times[0].removeprefix('us, ')}")  # fmt: skip
    number_ticks(axes, sorted(set(square["nodes"])))
    legend_above(axes, 2 if is_narrow(width) else 4)
    return figure
