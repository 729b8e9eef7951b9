"""``report``: what a run keeps for its page, and the page of a run's folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from emd_retrieval._checks import check_positive
from emd_retrieval._files import write_text
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.matching.clusters import METHODS
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import shortlist_figure
from emd_retrieval.reports.explorer import ExplorerData, Match, PageFigure, Picture, Query
from emd_retrieval.reports.explorer import render_page as page_of
from emd_retrieval.reports.explorer.data import ClassResult
from emd_retrieval.reports.training import training_figure
from emd_retrieval.retrieval import Evaluation
from emd_retrieval.training.model import SUMMARY_FILE, read_summary
from emd_retrieval.training.monitor import read_log
from emd_retrieval.workflows.gallery import ImageSide, Pixels

EXPLORER_FILE = "explorer.npz"
PAGE_FILE = "report.html"

_METRIC = "MAP@R"
_NEIGHBOURS = 6
_SIDE = 224  # pixels, the longer side of a kept picture
_QUALITY = 80
_MOST_BYTES = 16_000_000  # of pictures; what a phone still opens
_LEAST_FLOW = 1e-4  # of the mass; dense couplings move a little everywhere
_PAIRS_AT_ONCE = 256


@dataclass(frozen=True)
class _Sides:
    query: ImageSide
    gallery: ImageSide

    @property
    def same(self) -> bool:
        return self.query is self.gallery


def collect_explorer(
    evaluation: Evaluation,
    query: ImageSide,
    gallery: ImageSide,
    *,
    matcher: EMDMatcher,
    boxes: Callable[[Image.Image], Tensor | None],
    view: Callable[[Image.Image], Pixels],
    queries: int = 200,
) -> ExplorerData:
    """Queries worth a look with their neighbours, pictures and matches.

    At most ``queries`` are kept, in turn the one that gained most, the one that lost most and one
    that did not change; fewer where their pictures would exceed 16 MB.

    Args:
        evaluation: Two rankings, the baseline first.
        query: The queries.
        gallery: What was searched; the very object ``query`` where the queries were.
        matcher: The EMD similarity that ranked.
        boxes: Where the nodes of an image lie, as shares of its view; without them there are
            neighbours and no matches. Shape of its result: ``[N, 4]``.
        view: The part of an image that the network saw.
        queries: At most so many.

    Raises:
        ValueError: If ``queries`` is not positive.
    """
    check_positive("queries", queries)
    sides = _Sides(query, gallery)
    names = list(evaluation.rankings)[:2]
    rankings = [evaluation.rankings[name] for name in names]
    scores = [evaluation.scores[name] for name in names]
    rows = scores[0].queries
    before, after = (score.per_query[_METRIC].to_numpy() for score in scores)
    depth = min(_NEIGHBOURS, *(ranking.depth for ranking in rankings))

    class_names = query.collection.class_names
    if gallery.collection.class_names != class_names:
        raise ValueError("gallery: expected the classes of query, in the same order")
    pictures: list[Picture] = []
    place_of: dict[tuple[bool, int], int] = {}
    row_of: list[int] = []
    kept: list[Query] = []
    size = 0

    def picture_of(row: int, *, of_gallery: bool) -> int:
        nonlocal size
        key = of_gallery and not sides.same, row
        if key not in place_of:
            place_of[key] = len(pictures)
            pictures.append(
                _picture(sides.gallery if of_gallery else sides.query, row, boxes, view)
            )
            row_of.append(row)
            size += len(pictures[-1].jpeg)
        return place_of[key]

    for i in _in_turn(after - before):
        if len(kept) == queries or size > _MOST_BYTES:
            break
        row = int(rows[i])
        answers = [ranking.rows[row, :depth].tolist() for ranking in rankings]
        kept.append(
            Query(
                picture=picture_of(row, of_gallery=False),
                scores=(float(before[i]), float(after[i])),
                neighbours=np.array(
                    [[picture_of(a, of_gallery=True) for a in answer] for answer in answers],
                    np.int32,
                ),
                similarities=torch.stack(
                    [ranking.scores[row, :depth].float() for ranking in rankings]
                ).numpy(),
            )
        )
    pairs = sorted({(q.picture, int(p)) for q in kept for p in q.neighbours.ravel()})
    return ExplorerData(
        methods=(names[0], names[1]),
        metric=_METRIC,
        class_names=class_names,
        total=len(rows),
        pictures=pictures,
        queries=kept,
        matches=dict(_matches(pairs, pictures, row_of, sides, matcher)),
        classes=_class_results(query, rows, before, after),
    )


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """The page of a run's folder: its records, curves, and the explorer where the run kept one.

    Args:
        run: Folder that a command wrote.
        output: The HTML file; ``report.html`` in the folder by default.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it to report.
        ValueError: If a file of it cannot be read.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"run: no folder {str(run)!r}")
    records = list(_records(run))
    figures = [*_tradeoffs(records), *_training(run)]
    file = run / EXPLORER_FILE
    explorer = ExplorerData.load(file) if file.is_file() else None
    if not records and not figures and explorer is None:
        raise FileNotFoundError(
            f"run: {run} holds no result record (NAME.json) and no training log; pass the folder "
            "that evaluate, train, table8 or rerank wrote"
        )
    page = page_of(records, figures=figures, explorer=explorer, title=None if records else run.name)
    return write_text(run / PAGE_FILE if output is None else output, page)


def _picture(
    side: ImageSide,
    row: int,
    boxes: Callable[[Image.Image], Tensor | None],
    view: Callable[[Image.Image], Pixels],
) -> Picture:
    image = side.image(row)
    places = boxes(image)
    small = Image.fromarray(view(image))
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    number = int(side.features.ids[row])
    return Picture(
        name=side.collection.image_name(number),
        label=int(side.collection.labels[number]),
        size=small.size,
        jpeg=buffer.getvalue(),
        boxes=None if places is None else places.numpy().astype(np.float32),
    )


def _in_turn(change: np.ndarray) -> Iterator[int]:
    """Places of queries: the most improved, the most worsened, an unchanged one, and again."""
    order = np.argsort(-change, kind="stable")
    groups = [
        [int(i) for i in order if change[i] > 0],
        [int(i) for i in order[::-1] if change[i] < 0],
        [int(i) for i in order if change[i] == 0],
    ]
    for turn in range(max(map(len, groups))):
        yield from (group[turn] for group in groups if turn < len(group))


def _matches(
    pairs: Sequence[tuple[int, int]],
    pictures: Sequence[Picture],
    row_of: Sequence[int],
    sides: _Sides,
    matcher: EMDMatcher,
) -> Iterator[tuple[tuple[int, int], Match]]:
    if matcher.weights in METHODS:
        return  # nodes that are clusters lie nowhere in the image
    pairs = [pair for pair in pairs if all(pictures[p].boxes is not None for p in pair)]
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        query, reference = (
            side.features.nodes[[row_of[pair[end]] for pair in part]]
            for end, side in enumerate((sides.query, sides.gallery))
        )
        match = matcher.match(query, reference)
        for number, pair in enumerate(part):
            flow, cost = match.flow[number].numpy(), match.cost[number].numpy()
            moved = np.argwhere(flow > _LEAST_FLOW)
            yield (
                pair,
                Match(
                    similarity=float(match.similarity[number]),
                    query_weights=match.query_weights[number].numpy(),
                    reference_weights=match.reference_weights[number].numpy(),
                    pairs=moved.astype(np.uint16),
                    flow=flow[tuple(moved.T)],
                    cost=cost[tuple(moved.T)],
                ),
            )


def _class_results(
    query: ImageSide, rows: Tensor, before: np.ndarray, after: np.ndarray
) -> list[ClassResult]:
    table = pd.DataFrame(
        {"name": [query.label(int(r)) for r in rows], "before": before, "after": after}
    )
    return [
        ClassResult(str(name), len(part), float(part["before"].mean()), float(part["after"].mean()))
        for name, part in table.groupby("name")
    ]


def _records(run: Path) -> Iterator[ResultRecord]:
    for file in sorted(run.glob("*.json")):
        try:
            yield ResultRecord.load(file)
        except ValueError:
            # Settings and manifests lie beside records; what is no record is not shown.
            continue


def _tradeoffs(records: Sequence[ResultRecord]) -> Iterator[PageFigure]:
    for record in records:
        curve = record.tables.get("shortlist")
        if curve is None or not {"shortlist", "P@1", "RP", "MAP@R", "ms a query"} <= set(curve):
            continue
        first = None
        if {"method", "metric", "value"} <= set(record.table):
            raw = record.table[record.table["method"] == "Raw"]
            first = {str(k): float(v) for k, v in zip(raw["metric"], raw["value"], strict=True)}
        yield PageFigure(
            "Shortlist trade-off",
            "Metrics and milliseconds a query against the size of the shortlist; the numbers are "
            "in the table above.",
            _svg(shortlist_figure(curve, first or None)),
        )


def _training(run: Path) -> Iterator[PageFigure]:
    log = pd.DataFrame(read_log(run)).apply(pd.to_numeric, errors="coerce")
    if not {"step", "loss"} <= set(log):
        return
    empty = pd.DataFrame({"step": [], _METRIC: []})
    validation = log.dropna(subset=[_METRIC]) if _METRIC in log else empty
    finished = (run / SUMMARY_FILE).is_file()
    figure = training_figure(
        log.dropna(subset=["loss"]),
        validation,
        metric=_METRIC,
        best_step=read_summary(run)["best_step"] if finished else None,
    )
    yield PageFigure(
        "Training", "The loss, and validation on held-out classes, over steps.", _svg(figure)
    )


def _svg(figure: Figure) -> bytes:
    """A figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "emd_retrieval"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
