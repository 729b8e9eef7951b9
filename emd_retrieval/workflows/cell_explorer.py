"""Two cells of Table 8 for the explorer: a loss's Raw model against its model of sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from emd_retrieval.datasets import ImageCollection
from emd_retrieval.features import FeatureSet
from emd_retrieval.reports.explorer import ExplorerData
from emd_retrieval.reports.table8 import LOSS_NAMES, METHOD_NAMES
from emd_retrieval.retrieval import Ranking, compare_rankings, rank_by
from emd_retrieval.retrieval.metrics import relevant_counts
from emd_retrieval.training import TrainedModel, embed_collection, load_model
from emd_retrieval.workflows.cell_scores import RAW, Cell
from emd_retrieval.workflows.explorer import collect_explorer
from emd_retrieval.workflows.gallery import ImageSide
from emd_retrieval.workflows.train import Machine

_FIRST_CHOICE = "multi_similarity"


def choose_cells(cells: Sequence[Cell]) -> tuple[Cell, Cell] | None:
    """Raw and a method of one loss and the lowest seed; multi-similarity where it is there.

    Args:
        cells: Those that finished, in the table's order.

    Returns:
        Raw, and the first method that has it; ``None`` where no loss has both.
    """
    plain = [cell for cell in cells if not cell.control]
    pairs = [
        (raw, cell)
        for cell in plain
        for raw in plain
        if cell.method != RAW and (raw.loss, raw.method, raw.seed) == (cell.loss, RAW, cell.seed)
    ]
    pairs.sort(key=lambda pair: (pair[1].loss != _FIRST_CHOICE, pair[1].seed))
    return pairs[0] if pairs else None


def explore_cells(
    pair: tuple[Cell, Cell], runs: Path, test: ImageCollection, machine: Machine, *, queries: int
) -> ExplorerData:
    """Rank the test images by both models, and keep what the explorer shows.

    Args:
        pair: See :func:`choose_cells`.
        runs: Folder of the cells' runs.
        test: The test images.
        machine: Where to compute; features that the table made are read from its cache.
        queries: At most so many.
    """
    models = [load_model(runs / str(cell), weights=machine.weights) for cell in pair]
    features = [_features(model, test, machine) for model in models]
    rankings = {
        _name(cell): _ranking(model, part)
        for cell, model, part in zip(pair, models, features, strict=True)
    }
    recipe, side = models[1].recipe, ImageSide(test, features[1])
    views = {"resize": recipe.views.resize, "crop": recipe.views.crop}
    return collect_explorer(
        compare_rankings(rankings, features[1].labels),
        side,
        side,
        matcher=recipe.matching,
        boxes=partial(models[1].extractor.node_boxes, **views),
        view=models[1].extractor.evaluation_view(**views),
        queries=queries,
    )


def _name(cell: Cell) -> str:
    return f"{METHOD_NAMES[cell.method].lstrip('+')}, {LOSS_NAMES.get(cell.loss, cell.loss)}"


def _features(model: TrainedModel, test: ImageCollection, machine: Machine) -> FeatureSet:
    return embed_collection(
        model,
        test,
        cache=machine.cache,
        device=machine.device,
        bf16=model.recipe.optimization.bf16,
        workers=machine.num_workers,
        description="for the explorer",
    )


def _ranking(model: TrainedModel, features: FeatureSet) -> Ranking:
    labels = features.labels
    deepest = int(relevant_counts(labels, labels, gallery_includes_query=True).max())
    similarities = model.similarities(features, description="for the explorer")
    return rank_by(similarities, max(1, deepest), exclude=torch.arange(len(labels)))
