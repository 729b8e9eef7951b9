"""``evaluate``: Raw against DeepEMD on images, on stored embeddings, or a ready ranking."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emd_retrieval._checks import check_positive
from emd_retrieval._files import check_folder
from emd_retrieval.datasets import (
    ImageCollection,
    ImageDataset,
    UnreadableImageError,
    check_readable,
    load_images,
)
from emd_retrieval.features import FeatureSet, extract_features
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import save_figure, shortlist_figure
from emd_retrieval.retrieval import (
    Evaluation,
    compare_rankings,
    evaluate_sets,
    evaluate_vectors,
)
from emd_retrieval.retrieval.evaluation import check_shortlist
from emd_retrieval.retrieval.metrics import relevant_counts
from emd_retrieval.workflows.explorer import EXPLORER_FILE, collect_explorer
from emd_retrieval.workflows.gallery import ImageSide, save_pictures
from emd_retrieval.workflows.inputs import read_labels, read_matrix, read_ranking
from emd_retrieval.workflows.models import FeatureSettings, ImageModel
from emd_retrieval.workflows.report import write_report

_TITLES = {"fcn": "FCN", "grid": "Grid", "sampling": "Sampling"}


@dataclass(frozen=True, kw_only=True)
class EvaluateImages(FeatureSettings):
    """Settings of :func:`evaluate_images`; the defaults are the protocol of Table 8.

    Those of features are as in :class:`FeatureSettings`; the seed is the bootstrap's as well.

    Attributes:
        data: Folder in CUB's layout, or of class sub-folders.
        classes: Class numbers, ranges or names; all by default.
        gallery: A second folder to search in; by default the queries are searched among themselves.
        shortlist: Candidates of the first stage; ``None`` compares all pairs.
        matcher: The EMD similarity; a trained run has its own.
        batch_size: Images a forward pass.
        bf16: Run the backbone in bfloat16.
        num_workers: Processes that decode images.
        skip_errors: Leave unreadable images out, and say how many.
        report: Queries to keep for the explorer of ``report.html``, which is written as well;
            ``None`` keeps none and writes no page.
    """

    data: Path
    classes: str | None = None
    gallery: Path | None = None
    shortlist: int | None = 100
    matcher: EMDMatcher = field(default_factory=EMDMatcher)
    batch_size: int = 32
    bf16: bool = False
    num_workers: int = 0
    skip_errors: bool = False
    report: int | None = None


def evaluate_images(
    settings: EvaluateImages, output: str | Path | None = None
) -> tuple[ResultRecord, Evaluation]:
    """Extract, retrieve, re-rank and score the images of a folder.

    Args:
        settings: What to evaluate, and how.
        output: Folder for the record (markdown, CSV, JSON) and the figures; ``None`` writes
            nothing.

    Returns:
        The record and the evaluation behind it.

    Raises:
        FileNotFoundError: If a folder or file is missing.
        ValueError: If images, classes, weights or settings do not fit; the message says what to do.
    """
    if output is not None:
        check_folder(output)
    if settings.report is not None:
        check_positive("report", settings.report)
    query, skipped = _load(settings.data, settings.classes, settings.skip_errors)
    gallery, more = (
        _load(settings.gallery, settings.classes, settings.skip_errors)
        if settings.gallery is not None
        else (None, 0)
    )
    skipped += more
    if gallery is not None:
        query, gallery = _on_common_labels(query, gallery)
    _check_labels(query, gallery, settings.shortlist)
    model = settings.load(settings.matcher)
    extractor, matcher = model.extractor, model.matcher
    query_features = _extract(query, model, settings, "extracting")
    gallery_features = _extract(gallery, model, settings, "extracting gallery") if gallery else None
    method = f"DeepEMD-{_TITLES[extractor.name]}"
    evaluation = evaluate_sets(
        query_features,
        gallery_features,
        matcher=matcher,
        shortlist=settings.shortlist,
        method=method,
        seed=settings.seed,
    )
    data = query.describe()
    if gallery is not None:
        data = {"query": data, "gallery": gallery.describe()}
    record = ResultRecord(
        name="evaluate",
        title=f"Raw against {method} on {query.name}",
        tables=_tables(evaluation),
        summary=evaluation.summary,
        settings={
            **extractor.describe(),
            **matcher.describe(),
            **model.described,
            "resize": model.resize,
            "crop": model.crop,
            "shortlist": settings.shortlist or "all pairs",
            "bf16": settings.bf16,
        },
        data=data,
        seed=settings.seed,
        notes=_notes(evaluation, skipped, patches=extractor.name != "fcn"),
    )
    if output is not None:
        query_side = ImageSide(query, query_features)
        gallery_side = query_side
        if gallery is not None and gallery_features is not None:
            gallery_side = ImageSide(gallery, gallery_features)
        boxes = partial(
            extractor.node_boxes, resize=model.resize, crop=model.crop, seed=settings.seed
        )
        view = extractor.evaluation_view(resize=model.resize, crop=model.crop)
        figures = save_pictures(
            evaluation,
            query_side,
            gallery_side,
            output,
            matcher=matcher,
            boxes=boxes,
            view=view,
        )
        record = record.with_figures(figures)
        if settings.report is not None:
            explorer = collect_explorer(
                evaluation,
                query_side,
                gallery_side,
                matcher=matcher,
                boxes=boxes,
                view=view,
                queries=settings.report,
            )
            explorer.save(Path(output) / EXPLORER_FILE)
        record = _save(record, evaluation, output)
        if settings.report is not None:
            write_report(output)
    return record, evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluateSets:
    """Settings of :func:`evaluate_stored_sets`.

    Attributes:
        embeddings: Packed sets ``[n, N * D]``, sets ``[n, N, D]`` or plain vectors ``[n, D]``, as
            ``.npy`` or parquet (one row an image; a ``label`` column may ride along).
        labels: Labels, one an image, as ``.npy``, parquet or CSV; or in the embeddings' parquet.
        channels: D of packed sets; plain vectors without it.
        gallery_embeddings: What to search in; by default the queries among themselves.
        gallery_labels: Its labels.
        global_node: Index of the node that is the global vector; by default the mean of the
            normalised nodes is.
        shortlist: Candidates of the first stage; ``None`` compares all pairs.
        matcher: The EMD similarity.
        seed: Seed of the bootstrap.
    """

    embeddings: Path
    labels: Path | None = None
    channels: int | None = None
    gallery_embeddings: Path | None = None
    gallery_labels: Path | None = None
    global_node: int | None = None
    shortlist: int | None = 100
    matcher: EMDMatcher = field(default_factory=EMDMatcher)
    seed: int = 0


def evaluate_stored_sets(
    settings: EvaluateSets, output: str | Path | None = None
) -> tuple[ResultRecord, Evaluation]:
    """Score embeddings that exist already: packed sets by Raw and EMD, plain vectors by cosine.

    Args:
        settings: What to evaluate, and how.
        output: Folder for the record and the figure; ``None`` writes nothing.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file cannot be read, or shapes, labels and settings do not fit.
    """
    if output is not None:
        check_folder(output)
    if settings.gallery_labels is not None and settings.gallery_embeddings is None:
        raise ValueError("gallery_labels: there is no gallery; pass gallery_embeddings with them")
    query, names = _stored(
        settings.embeddings, settings.labels, settings.channels, settings.global_node, None
    )
    gallery: FeatureSet | None = None
    if settings.gallery_embeddings is not None:
        gallery, _ = _stored(
            settings.gallery_embeddings,
            settings.gallery_labels,
            settings.channels,
            settings.global_node,
            names,
        )
    plain = query.nodes.shape[1] == 1 and (gallery is None or gallery.nodes.shape[1] == 1)
    if plain:
        # A single node a side is matched with itself: EMD is the cosine distance of Raw.
        evaluation = evaluate_vectors(query, gallery, seed=settings.seed)
    else:
        evaluation = evaluate_sets(
            query,
            gallery,
            matcher=settings.matcher,
            shortlist=settings.shortlist,
            seed=settings.seed,
        )
    record = ResultRecord(
        name="evaluate",
        title="Cosine retrieval of plain vectors" if plain else "Raw against DeepEMD, stored sets",
        tables=_tables(evaluation),
        summary=evaluation.summary,
        settings={
            "nodes": query.nodes.shape[1],
            "channels": query.nodes.shape[2],
            "global_node": "mean of nodes"
            if settings.global_node is None
            else settings.global_node,
            **({} if plain else settings.matcher.describe()),
            **({} if plain else {"shortlist": settings.shortlist or "all pairs"}),
        },
        data={
            "embeddings": settings.embeddings.name,
            "images": len(query),
            "classes": len(query.labels.unique()),
            **(
                {"gallery": settings.gallery_embeddings.name, "gallery_images": len(gallery)}
                if gallery is not None and settings.gallery_embeddings is not None
                else {}
            ),
        },
        seed=settings.seed,
        notes=_notes(evaluation, 0),
    )
    if output is not None:
        record = _save(record, evaluation, output)
    return record, evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluateRanking:
    """Settings of :func:`evaluate_ranking`.

    Attributes:
        ranking: Table with columns ``query``, ``id`` and, unless rows are in order already,
            ``rank`` (ascending) or ``score`` (descending); parquet or CSV.
        labels: Table with columns ``id``, ``label`` of the gallery; parquet or CSV.
        query_labels: The same for the queries; by default they are gallery images, and a query's
            own row in its answer is left out.
        baseline: A second ranking to compare with, for instance the order before re-ranking.
        seed: Seed of the bootstrap.
    """

    ranking: Path
    labels: Path
    query_labels: Path | None = None
    baseline: Path | None = None
    seed: int = 0


def evaluate_ranking(
    settings: EvaluateRanking, output: str | Path | None = None
) -> tuple[ResultRecord, Evaluation]:
    """Score a ranking that some other system made.

    Args:
        settings: What to evaluate.
        output: Folder for the record; ``None`` writes nothing.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a table lacks a column, an id has no label, or an answer is shorter than R.
    """
    if output is not None:
        check_folder(output)
    table = read_ranking(settings.ranking, settings.labels, settings.query_labels)
    rankings = {"ranking": table.ranking}
    if settings.baseline is not None:
        other = read_ranking(settings.baseline, settings.labels, settings.query_labels)
        if other.queries != table.queries:
            raise ValueError(
                f"baseline: {settings.baseline.name} answers {len(other.queries)} queries, "
                f"{settings.ranking.name} {len(table.queries)}; both must answer the same ones"
            )
        rankings = {"baseline": other.ranking, "ranking": table.ranking}
    evaluation = compare_rankings(
        rankings,
        table.query_labels,
        table.gallery_labels,
        gallery_includes_query=table.gallery_includes_query,
        seed=settings.seed,
    )
    record = ResultRecord(
        name="evaluate",
        title=f"Scores of {settings.ranking.name}",
        tables=_tables(evaluation),
        summary=evaluation.summary,
        settings={k: v.name for k, v in asdict(settings).items() if isinstance(v, Path)},
        data={
            "queries": len(table.queries),
            "depth": table.ranking.depth,
            "gallery": len(table.gallery_labels),
        },
        seed=settings.seed,
        notes=_notes(evaluation, 0),
    )
    if output is not None:
        record = _save(record, evaluation, output)
    return record, evaluation


def _load(folder: Path, classes: str | None, skip_errors: bool) -> tuple[ImageCollection, int]:
    collection = load_images(folder, classes)
    # To leave damaged images out they must be known before the run; decoding finds them all.
    collection, unreadable = check_readable(collection, skip_errors=skip_errors, decode=skip_errors)
    for bad in unreadable:
        warnings.warn(f"left out {bad.name}: {bad.reason}", stacklevel=3)
    return collection, len(unreadable)


def _on_common_labels(
    query: ImageCollection, gallery: ImageCollection
) -> tuple[ImageCollection, ImageCollection]:
    """Number the classes of both sides alike, by name."""
    names = tuple(sorted({*query.class_names, *gallery.class_names}))
    numbers = tuple(range(1, len(names) + 1))
    place = {name: i for i, name in enumerate(names)}
    query, gallery = (
        replace(
            side,
            labels=np.array([place[name] for name in side.class_names])[side.labels],
            class_names=names,
            class_numbers=numbers,
        )
        for side in (query, gallery)
    )
    return query, gallery


def _check_labels(
    query: ImageCollection, gallery: ImageCollection | None, shortlist: int | None
) -> None:
    """Find what makes the metrics meaningless before anything is extracted."""
    labels = torch.from_numpy(query.labels.copy())
    target = labels if gallery is None else torch.from_numpy(gallery.labels.copy())
    relevant = relevant_counts(labels, target, gallery_includes_query=gallery is None)
    deepest = int(relevant.max())
    if deepest < 1:
        why = "has one image per class" if gallery is None else "shares no class with the gallery"
        raise ValueError(
            f"data: {query.name} {why}, so no query has anything to find: R-Precision and MAP@R "
            "need at least two images of a class"
        )
    if shortlist is not None:
        check_shortlist(shortlist, deepest)


def _extract(
    collection: ImageCollection, model: ImageModel, settings: EvaluateImages, name: str
) -> FeatureSet:
    transform = model.extractor.evaluation_transform(
        resize=model.resize, crop=model.crop, seed=settings.seed
    )
    try:
        return extract_features(
            ImageDataset(collection, transform),
            model.extractor,
            batch_size=settings.batch_size,
            device=settings.device,
            bf16=settings.bf16,
            num_workers=settings.num_workers,
            description=name,
        )
    except UnreadableImageError as error:
        # The traceback holds the decoding processes; left to the garbage collector, each of them
        # keeps the program for seconds.
        traceback.clear_frames(error.__traceback__)
        raise UnreadableImageError(
            f"{error}. Restore or remove the image, or set skip_errors (--skip-errors) to go on "
            "without unreadable ones"
        ) from error


def _stored(
    embeddings: Path,
    labels: Path | None,
    channels: int | None,
    global_node: int | None,
    names: dict[Any, int] | None,
) -> tuple[FeatureSet, dict[Any, int]]:
    nodes, pooled, own_labels = read_matrix(embeddings, channels, global_node)
    option = "labels" if names is None else "gallery_labels"
    numbered, names = read_labels(labels, own_labels, len(nodes), embeddings, names, option=option)
    return FeatureSet(nodes, pooled, numbered, torch.arange(len(nodes))), names


def _tables(evaluation: Evaluation) -> dict[str, Any]:
    tables = {"metrics": evaluation.metrics}
    if evaluation.curve is not None:
        tables["shortlist"] = evaluation.curve
    return tables


def _notes(evaluation: Evaluation, skipped: int, *, patches: bool = False) -> tuple[str, ...]:
    notes = ["Percent, with 95 % bootstrap intervals over queries; gains are paired by query."]
    if patches:
        notes.append("Raw is the mean of the patch features, not the feature of the whole image.")
    if evaluation.left_out:
        notes.append(
            f"{evaluation.left_out} queries have no other image of their class and are left out."
        )
    if skipped:
        notes.append(f"{skipped} images could not be read and are left out.")
    return tuple(notes)


def _save(record: ResultRecord, evaluation: Evaluation, output: str | Path) -> ResultRecord:
    """Write the record with the shortlist figure, and return it as written."""
    if evaluation.curve is not None:
        raw = next(iter(evaluation.scores.values())).mean
        save_figure(shortlist_figure(evaluation.curve, raw), Path(output) / "shortlist.png")
        record = record.with_figures(["shortlist.png"])
    record.save(output)
    return record
