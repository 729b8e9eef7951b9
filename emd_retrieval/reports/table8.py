"""Table 8 for people: the paper's numbers, a layout for markdown, LaTeX, and a chart of gains.

Numbers come in computed; the paper's are in ``paper_table8.csv``, transcribed. (Of its printed
differences one is wrong: ArcFace with DeepEMD-F gains 1.18 in P@1, not 1.45.)
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emd_retrieval.reports.style import CHART, COLORS, PAGE, QUIET, is_narrow, panels

METRICS = ("P@1", "RP", "MAP@R")
LOSS_NAMES = {
    "normalized_softmax": "N. Softmax",
    "contrastive": "Contrastive",
    "soft_triple": "SoftTriple",
    "snr_contrastive": "SNR",
    "arcface": "ArcFace",
    "multi_similarity": "MS",
}
METHOD_NAMES = {
    "raw": "Raw",
    "fcn": "+DeepEMD-F",
    "grid": "+DeepEMD-G",
    "sampling": "+DeepEMD-S",
}
CONTROL_NAMES = {
    "mean": "mean of the nodes, cosine",
    "uniform": "equal weights",
    "dense": "dense connections, no EMD",
    "detached": "weights without gradient",
    "evaluation": "EMD at evaluation only",
}

_STYLES = {"fcn": (COLORS[0], "o"), "grid": (COLORS[1], "s"), "sampling": (COLORS[2], "^")}


def paper_table8() -> pd.DataFrame:
    """The paper's Table 8: ``loss``, ``method``, ``P@1``, ``RP``, ``MAP@R``, in percent.

    Example:
        >>> table = paper_table8().set_index(["loss", "method"])
        >>> float(table.loc[("multi_similarity", "sampling"), "P@1"])
        69.51
    """
    file = resources.files("emd_retrieval.reports") / "paper_table8.csv"
    with file.open(encoding="utf-8") as lines:
        return pd.read_csv(lines)


def table8_layout(cells: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """Rows as in the paper: a loss's Raw, then its sets with their gains, beside the paper's.

    Args:
        cells: A row a loss, method, control and metric, with ``value``, ``spread``, ``gain`` and
            its bounds, ``paper`` and ``paper_gain``.
        means: A row a method, control and metric, averaged over ``losses``; they make the last
            rows.

    Returns:
        Text, three columns a metric: value (± standard deviation over seeds), gain with its 95 %
        interval, and the paper's value and gain.
    """
    rows = []
    for loss, method, part in _variants(cells[cells["control"] == ""]):
        row = {"loss": _loss(loss), "method": _method(method)}
        for metric, entry in _by_metric(part):
            row[metric] = _with_spread(entry["value"], entry["spread"])
            row[f"gain in {metric}"] = _interval(entry, "gain")
            row[f"paper's {metric}"] = _paper(entry)
        rows.append(row)
    for name, part in means[means["control"] == ""].groupby("method", sort=False):
        row = {"loss": f"mean of {part['losses'].iloc[0]}", "method": _method(name)}
        for metric, entry in _by_metric(part):
            row[metric] = ""
            row[f"gain in {metric}"] = _interval(entry, "gain")
            row[f"paper's {metric}"] = _signed(entry["paper_gain"])
        rows.append(row)
    return pd.DataFrame(rows)


def controls_layout(cells: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """What else one could do with the same nodes, and what the method has over it.

    Args:
        cells: As for :func:`table8_layout`.
        means: Likewise.

    Returns:
        Text, a row a method and control, averaged over losses, then a row a loss.
    """
    rows = []
    for (method, control), part in means[means["control"] != ""].groupby(
        ["method", "control"], sort=False
    ):
        rows.append(_control_row(f"mean of {part['losses'].iloc[0]}", method, control, part))
    controls = cells[cells["control"] != ""]
    for (loss, method, control), part in controls.groupby(
        ["loss", "method", "control"], sort=False
    ):
        rows.append(_control_row(_loss(loss), method, control, part))
    return pd.DataFrame(rows)


def table8_latex(cells: pd.DataFrame, means: pd.DataFrame) -> str:
    """Table 8 in LaTeX (needs ``booktabs`` and ``multirow``): ours and, in grey, the paper's.

    Args:
        cells: As for :func:`table8_layout`.
        means: Likewise.
    """
    lines = [
        r"% needs \usepackage{booktabs,multirow,xcolor}",
        r"\begin{tabular}{ll" + "rr" * len(METRICS) + "}",
        r"\toprule",
        "Loss & Method & " + " & ".join(rf"{m} $\uparrow$ & paper" for m in METRICS) + r" \\",
    ]
    main = cells[cells["control"] == ""]
    for loss, group in main.groupby("loss", sort=False):
        lines.append(r"\midrule")
        methods = list(_variants(group))
        for number, (_, method, part) in enumerate(methods):
            first = rf"\multirow{{{len(methods)}}}{{*}}{{{_tex(_loss(loss))}}}"
            columns = [first if number == 0 else "", _tex(_method(method))]
            for _, entry in _by_metric(part):
                columns.append(f"{entry['value']:.2f}{_tex_gain(entry, 'gain')}")
                paper = "" if pd.isna(entry["paper"]) else f"{entry['paper']:.2f}"
                columns.append(_grey(f"{paper}{_tex_gain(entry, 'paper_gain')}"))
            lines.append(" & ".join(columns) + r" \\")
    averages = means[means["control"] == ""]
    if len(averages):
        lines.append(r"\midrule")
    for name, part in averages.groupby("method", sort=False):
        columns = ["Mean gain", _tex(_method(name))]
        for _, entry in _by_metric(part):
            columns.append(_tex_gain(entry, "gain").strip())
            columns.append(_grey(_tex_gain(entry, "paper_gain").strip()))
        lines.append(" & ".join(columns) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


@rc_context(CHART)
def table8_figure(cells: pd.DataFrame, means: pd.DataFrame, *, width: float = PAGE) -> Figure:
    """Gains over Raw with 95 % intervals, a panel a metric; hollow marks are the paper's.

    Args:
        cells: As for :func:`table8_layout`.
        means: Likewise; they make the lowest row.
        width: In inches; the panels of a narrow figure lie below each other.

    Raises:
        ValueError: If no cell has a gain to draw.
    """
    gains = cells[(cells["control"] == "") & cells["gain"].notna()]
    averages = means[means["control"] == ""]
    if not len(gains):
        raise ValueError("cells: expected a method with a gain over Raw, got none")
    losses = list(dict.fromkeys(gains["loss"]))
    methods = [method for method in _STYLES if method in set(gains["method"])]
    rows = [*losses, "mean"]
    a_row = 0.2 + 0.09 * len(methods)
    figure, grid = panels(3, width, 0.75 + a_row * len(rows), sharey=True, sharex=is_narrow(width))
    for axes, metric in zip(grid, METRICS, strict=True):
        axes.axvline(0, color=QUIET, linewidth=0.8)
        axes.axhspan(len(losses) - 0.5, len(rows) - 0.5, color="#eef1f4", linewidth=0)
        for number, method in enumerate(methods):
            shift = 0.24 * (number - (len(methods) - 1) / 2)
            for table, place in ((gains, losses.index), (averages, lambda _: len(losses))):
                part = table[(table["method"] == method) & (table["metric"] == metric)]
                for _, entry in part.iterrows():
                    where = place(entry.get("loss", "mean")) + shift
                    _draw_gain(axes, entry, where, *_STYLES[method])
        axes.set_title(metric, loc="left")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        if not is_narrow(width) or axes is grid[-1]:
            axes.set_xlabel("gain over Raw (percent points)")
    grid[0].set_yticks(range(len(rows)), [*(_loss(loss) for loss in losses), "mean"])
    grid[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(handles=_legend(methods), loc="outside lower center",
                  ncols=2 if is_narrow(width) else 4)  # fmt: skip
    return figure


def _draw_gain(axes: Any, entry: Any, where: float, color: str, marker: str) -> None:
    axes.plot([entry["gain_low"], entry["gain_high"]], [where, where], color=color, linewidth=1.5)
    axes.plot(entry["gain"], where, color=color, marker=marker)
    if not pd.isna(entry["paper_gain"]):
        axes.plot(entry["paper_gain"], where, color=color, marker=marker, mfc="white", mew=0.9)


def _legend(methods: list[str]) -> list[Any]:
    handles = [
        Line2D([], [], color=_STYLES[m][0], marker=_STYLES[m][1], label=METHOD_NAMES[m])
        for m in methods
    ]
    paper = Line2D([], [], color=QUIET, marker="o", mfc="white", ls="none", label="the paper's")
    return [*handles, paper]


def _variants(cells: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    groups = cells.groupby(["loss", "method"], sort=False)
    return [(str(loss), str(method), part) for (loss, method), part in groups]


def _loss(name: Any) -> str:
    return LOSS_NAMES.get(str(name), str(name))


def _method(name: Any) -> str:
    return METHOD_NAMES.get(str(name), str(name))


def _by_metric(part: pd.DataFrame) -> list[tuple[str, Any]]:
    return [(str(entry["metric"]), entry) for _, entry in part.iterrows()]


def _control_row(loss: str, method: Any, control: Any, part: pd.DataFrame) -> dict[str, str]:
    row = {
        "loss": loss,
        "method": _method(method),
        "instead": CONTROL_NAMES.get(str(control), str(control)),
    }
    for metric, entry in _by_metric(part):
        row[f"its gain in {metric}"] = _interval(entry, "gain")
        row[f"the method's over it, {metric}"] = _interval(entry, "edge")
    return row


def _interval(entry: Any, name: str) -> str:
    if pd.isna(entry[name]):
        return ""
    low, high = entry[f"{name}_low"], entry[f"{name}_high"]
    return f"{entry[name]:+.2f} [{low:+.2f}, {high:+.2f}]"


def _with_spread(value: float, spread: float) -> str:
    return f"{value:.2f}" if pd.isna(spread) else f"{value:.2f} ± {spread:.2f}"


def _paper(entry: Any) -> str:
    if pd.isna(entry["paper"]):
        return ""
    gain = _signed(entry["paper_gain"])
    return f"{entry['paper']:.2f} ({gain})" if gain else f"{entry['paper']:.2f}"


def _signed(value: float) -> str:
    return "" if pd.isna(value) else f"{value:+.2f}"


def _tex_gain(entry: Any, name: str) -> str:
    if pd.isna(entry[name]):
        return ""
    if f"{name}_low" not in entry:
        return f" ${entry[name]:+.2f}$"
    low, high = entry[f"{name}_low"], entry[f"{name}_high"]
    return rf" ${entry[name]:+.2f}$ {{\scriptsize$[{low:+.2f}, {high:+.2f}]$}}"


def _grey(text: str) -> str:
    return rf"\textcolor{{gray}}{{{text}}}" if text else ""


def _tex(text: Any) -> str:
    return str(text).replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")
