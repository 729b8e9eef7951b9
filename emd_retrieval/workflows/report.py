"""``report``: the page of a run's folder, and its charts as files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from emd_retrieval._checks import check_choice
from emd_retrieval._files import check_folder, write_text
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import save_figure
from emd_retrieval.reports.charts import Chart, record_charts
from emd_retrieval.reports.explorer import ExplorerData, PageFigure
from emd_retrieval.reports.explorer import render_page as page_of
from emd_retrieval.reports.style import COLUMN, PAGE
from emd_retrieval.reports.training import training_figure
from emd_retrieval.training.model import SUMMARY_FILE, read_summary
from emd_retrieval.training.monitor import read_log
from emd_retrieval.workflows.explorer import EXPLORER_FILE
from emd_retrieval.workflows.report_cells import cells_report, is_cells_folder

PAGE_FILE = "report.html"
FORMATS = ("png", "svg")


def write_report(
    run: str | Path, output: str | Path | None = None, *, cells: str | Path | None = None
) -> Path:
    """The page of a run: its records, charts, and the explorer where the run kept one.

    Args:
        run: Folder that a command wrote, the runs' folder of Table 8, or a record (``NAME.json``).
        output: The HTML file; by default ``report.html`` in the folder, or the record's name with
            ``.html`` beside it.
        cells: The runs' folder of a Table 8 whose record is in ``run``: their training curves and
            their results by class come into the page.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: If there is no such folder or file, or nothing in it to report.
        ValueError: If a file of it cannot be read.
    """
    run = Path(run)
    records, charts = _contents(run, None if cells is None else Path(cells))
    file = run / EXPLORER_FILE
    explorer = ExplorerData.load(file) if file.is_file() else None
    if not records and not charts and explorer is None:
        raise FileNotFoundError(
            f"run: {run} holds no result record (NAME.json) and no training log; pass the folder "
            "that evaluate, train, table8, rerank or fewshot wrote"
        )
    figures = [
        PageFigure(chart.title, chart.text, _svg(chart.draw(PAGE)), _svg(chart.draw(COLUMN)))
        for chart in charts
    ]
    page = page_of(records, figures=figures, explorer=explorer, title=None if records else run.name)
    beside = run.with_suffix(".html") if run.is_file() else run / PAGE_FILE
    return write_text(beside if output is None else output, page)


def write_charts(
    run: str | Path,
    output: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    width: float = COLUMN,
) -> list[Path]:
    """The charts of a run as files, ``NAME.png`` and ``NAME.svg``.

    Args:
        run: As for :func:`write_report`.
        output: Folder.
        formats: ``"png"``, ``"svg"`` or both.
        width: In inches; a column of a two-column paper by default.

    Returns:
        The files written; none where the run has nothing to draw.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If a file of it cannot be read, or formats or width are not valid.
    """
    for name in formats:
        check_choice("formats", name, FORMATS)
    check_folder(output)
    _, charts = _contents(Path(run), None)
    files = []
    for chart in charts:
        figure = chart.draw(width)
        files += [save_figure(figure, Path(output) / f"{chart.name}.{end}") for end in formats]
    return files


def _contents(run: Path, cells: Path | None) -> tuple[list[ResultRecord], list[Chart]]:
    """Records and charts of a run."""
    if run.is_file():
        records = [ResultRecord.load(run)]
    elif run.is_dir():
        records = list(_records(run))
    else:
        raise FileNotFoundError(f"run: no folder {str(run)!r}")
    charts = [*(chart for record in records for chart in record_charts(record)), *_training(run)]
    if cells is None and not records and is_cells_folder(run):
        record, more = cells_report(run)
        return [record], _told_apart([*record_charts(record), *more])
    if cells is not None:
        record, more = cells_report(cells)
        classes = {name: table for name, table in record.tables.items() if name == "classes"}
        if classes and records:
            records[0] = replace(records[0], tables={**records[0].tables, **classes})
        charts += more
    return records, _told_apart(charts)


def _records(run: Path) -> Iterator[ResultRecord]:
    for file in sorted(run.glob("*.json")):
        try:
            yield ResultRecord.load(file)
        except ValueError:
            # Settings and manifests lie beside records; what is no record is not shown.
            continue


def _told_apart(charts: Sequence[Chart]) -> list[Chart]:
    """Charts of several records have names of their own, so that no file is written twice."""
    seen: dict[str, int] = {}
    named = []
    for chart in charts:
        number = seen[chart.name] = seen.get(chart.name, 0) + 1
        name = chart.name if number == 1 else f"{chart.name}_{number}"
        named.append(replace(chart, name=name))
    return named


def _training(run: Path) -> Iterator[Chart]:
    """The log of a training run, of retrieval or of a few-shot stage."""
    log = pd.DataFrame(read_log(run)).apply(pd.to_numeric, errors="coerce")
    if not {"step", "loss"} <= set(log):
        return
    metric = next((name for name in ("MAP@R", "validation") if name in log), None)
    empty = pd.DataFrame({"step": []})
    validation = empty if metric is None else log.dropna(subset=[metric])
    best = read_summary(run)["best_step"] if (run / SUMMARY_FILE).is_file() else None
    yield Chart(
        "training",
        "Training",
        "The loss, and validation on held-out classes, over steps.",
        lambda width: training_figure(
            log.dropna(subset=["loss"]),
            validation,
            metric=metric or "MAP@R",
            best_step=best,
            width=width,
        ),
    )


def _svg(figure: Figure) -> bytes:
    """A figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "emd_retrieval"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
