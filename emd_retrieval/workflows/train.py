"""``train``: a recipe to a trained, evaluated model in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from emd_retrieval._checks import check_positive
from emd_retrieval._checksums import load_table, save_table
from emd_retrieval._files import check_folder, write_text
from emd_retrieval.datasets import ImageCollection, check_readable
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import save_figure
from emd_retrieval.reports.table8 import LOSS_NAMES, METHOD_NAMES
from emd_retrieval.reports.training import training_figure
from emd_retrieval.retrieval import RetrievalScores, bootstrap_interval
from emd_retrieval.retrieval.metrics import METRICS
from emd_retrieval.training import (
    Recipe,
    TrainedModel,
    TrainedRun,
    embed_collection,
    load_recipe,
    load_recipe_data,
    train,
)
from emd_retrieval.training.model import RECIPE_FILE
from emd_retrieval.training.monitor import read_log
from emd_retrieval.training.recipe import read_flat_recipe

SCORES_FILE = "scores.parquet"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a run computes; nothing of it is part of a recipe.

    Attributes:
        cache: Folder for the features of frozen trunks, shared by all runs.
        weights: The backbone's weights file, in place of the recipe's.
        device: Torch device of the network: ``"cpu"``, ``"cuda"``, or one of several, ``"cuda:1"``.
        devices: How many devices of that kind train together.
        nodes: How many machines with as many devices each (:func:`emd_retrieval.training.train`).
        num_workers: Processes that decode images.
        compiled: Compile frozen trunks for features that are not cached yet.
    """

    cache: Path = Path("runs/trunk_features")
    weights: Path | None = None
    device: str = "cpu"
    devices: int = 1
    nodes: int = 1
    num_workers: int = 0
    compiled: bool = False

    def __post_init__(self) -> None:
        check_positive("devices", self.devices)
        check_positive("nodes", self.nodes)
        if self.processes > 1 and torch.device(self.device).index is not None:
            raise ValueError(
                f"device: expected a kind of device, as 'cuda', for {self.processes} processes; "
                f"got {self.device!r}"
            )

    @property
    def processes(self) -> int:
        """Processes that train together, each on a device of its own."""
        return self.devices * self.nodes


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Settings of :func:`train_recipe`.

    Attributes:
        recipe: The recipe's YAML file.
        run: Folder of the run; a run that was killed goes on in it.
        method: ``"raw"``, ``"fcn"``, ``"grid"`` or ``"sampling"``; the recipe's by default.
        overrides: Settings in place of the recipe's, as ``"section.key=value"``.
        data: Folder of the images; the recipe's by default.
        machine: Where to compute.
        validate_only: Leave the test classes alone; the record then holds validation only.
        seed: Seed of the bootstrap; that of training is the recipe's.
    """

    recipe: Path
    run: Path
    method: str | None = None
    overrides: Sequence[str] = ()
    data: Path | None = None
    machine: Machine = field(default_factory=Machine)
    validate_only: bool = False
    seed: int = 0


def train_recipe(
    settings: TrainRecipe,
) -> tuple[ResultRecord, RetrievalScores | None] | tuple[None, None]:
    """Train a recipe, and evaluate the model on the test classes by the paper's protocol.

    Query and gallery are the test images, every pair is compared by the model's own similarity.

    Args:
        settings: What to train, and where.

    Returns:
        The record, which lies in the run's folder as well, and the scores on the test classes. Of
        several processes the first one has these, the others none.

    Raises:
        FileNotFoundError: If the recipe, data or weights are missing.
        ValueError: If the recipe does not fit, or the folder holds a run of another one.
    """
    recipe = load_recipe(settings.recipe, method=settings.method, overrides=settings.overrides)
    check_folder(settings.run, "run")
    if settings.validate_only and not recipe.validation.folds:
        raise ValueError(
            "validation.folds: expected 2 or more with validate_only, got 0, which holds no "
            "classes out"
        )
    training, test = load_data(recipe, settings.data)
    trained = fit(recipe, settings.run, training, settings.machine)
    if not trained.is_first:
        return None, None
    tables: dict[str, pd.DataFrame] = {}
    scores = None
    if not settings.validate_only:
        scores = score(trained.model, test, settings.machine)
        write_scores(settings.run, scores, test)
        tables["metrics"] = _metrics(scores, settings.seed)
    if trained.summary["validation"] is not None:
        tables["validation"] = pd.DataFrame(
            [{"step": trained.summary["best_step"], **trained.summary["validation"]}]
        )
    record = _record(settings, trained, tables, test)
    record = record.with_figures(_curves(trained))
    record.save(settings.run)
    return record, scores


def load_data(recipe: Recipe, folder: Path | None) -> tuple[ImageCollection, ImageCollection]:
    """Training and test images of a recipe, every file looked at.

    Raises:
        FileNotFoundError: If the folder is missing; where the data are to be had is told.
        ValueError: If no folder is given, classes are missing or in both parts, or images damaged.
    """
    training, test = load_recipe_data(recipe.data, folder)
    for part in (training, test):
        check_readable(part)
    return training, test


def fit(recipe: Recipe, run: Path, training: ImageCollection, machine: Machine) -> TrainedRun:
    """Train a recipe on this machine; what stands in the folder already goes on."""
    device = torch.device(machine.device)
    return train(
        recipe,
        run,
        data=training,
        cache=machine.cache,
        weights=machine.weights,
        accelerator=device.type,
        devices=machine.devices if device.type == "cpu" or device.index is None else [device.index],
        nodes=machine.nodes,
        workers=machine.num_workers,
        compiled=machine.compiled,
    )


def score(model: TrainedModel, test: ImageCollection, machine: Machine) -> RetrievalScores:
    """P@1, RP and MAP@R of a model on test images among themselves, every pair compared."""
    features = embed_collection(
        model,
        test,
        cache=machine.cache,
        device=machine.device,
        bf16=model.recipe.optimization.bf16,
        workers=machine.num_workers,
        compiled=machine.compiled,
        description="test images",
    )
    return model.evaluate(features, description="all pairs")


def write_scores(run: Path, scores: RetrievalScores, test: ImageCollection) -> pd.DataFrame:
    """Keep scores query by query in the run's folder, whole or not at all.

    Returns:
        The table: a row an image, its name the index.
    """
    names = [test.image_name(row) for row in scores.queries.tolist()]
    table = scores.per_query.astype("float32").set_axis(pd.Index(names, name="image"))
    save_table(run / SCORES_FILE, table)
    return table


def read_scores(run: Path, recipe: Recipe, test: ImageCollection) -> pd.DataFrame | None:
    """What :func:`write_scores` kept; ``None`` where there is nothing yet.

    Raises:
        ValueError: If they are of another recipe (the differing keys are told) or other images, or
            the file is damaged.
    """
    if not (run / SCORES_FILE).is_file() or not (run / RECIPE_FILE).is_file():
        return None
    differences = recipe.differences(read_flat_recipe(run / RECIPE_FILE))
    if differences:
        shown = "; ".join(
            f"{key}: {mine!r} here, {theirs!r} there" for key, (mine, theirs) in differences.items()
        )
        raise ValueError(
            f"run: {run} holds a run of another recipe ({shown}). Take another folder, or remove "
            "that one"
        )
    try:
        scores = load_table(run / SCORES_FILE)
    except ValueError as error:
        raise ValueError(f"run: {error}; remove it, and it is made again") from error
    if not scores.index.isin([test.image_name(row) for row in range(len(test))]).all():
        raise ValueError(f"run: {run} was scored on other images than {test.name} has now")
    return scores


def keep_recipe(run: Path, recipe: Recipe) -> None:
    """Say in a folder what its scores are of, where no training does."""
    write_text(run / RECIPE_FILE, recipe.to_yaml())


def _metrics(scores: RetrievalScores, seed: int) -> pd.DataFrame:
    rows = []
    for metric in METRICS.values():
        interval = bootstrap_interval(scores.per_query[metric].to_numpy(), seed=seed)
        rows.append(
            {
                "metric": metric,
                "value": scores.mean[metric],
                "low": interval.low,
                "high": interval.high,
            }
        )
    return pd.DataFrame(rows)


def _record(
    settings: TrainRecipe,
    trained: TrainedRun,
    tables: dict[str, pd.DataFrame],
    test: ImageCollection,
) -> ResultRecord:
    recipe, summary = trained.model.recipe, trained.summary
    chosen = recipe.to_dict()
    chosen.pop("notes")
    method = METHOD_NAMES[recipe.model.method].lstrip("+")
    notes = [
        f"{summary['steps']} steps in {summary['seconds']:.0f} s"
        f"{', stopped early' if summary['stopped_early'] else ''}; the weights are those of step "
        f"{summary['best_step']}."
    ]
    if recipe.validation.folds:
        held_out = len(summary["held_out_classes"])
        notes.append(f"Validation is on {held_out} training classes that were held out.")
    if "metrics" in tables:
        notes.append(
            "Query and gallery are the test images, every pair is compared; percent, with 95 % "
            "bootstrap intervals over queries."
        )
    data: dict[str, Any] = {"train": summary["data"]}
    if not settings.validate_only:
        data["test"] = test.describe()
    return ResultRecord(
        name="train",
        title=f"{method} trained with {LOSS_NAMES.get(recipe.loss.name, recipe.loss.name)} "
        f"on {recipe.data.name}",
        tables=tables,
        settings={**chosen, "weights": summary["weights"]},
        data=data,
        seed=recipe.seed,
        notes=tuple(notes),
    )


def _curves(trained: TrainedRun) -> list[str]:
    """The run's log as a figure beside it."""
    log = pd.DataFrame(read_log(trained.path)).apply(pd.to_numeric, errors="coerce")
    if not len(log):
        return []
    metric = trained.model.recipe.validation.metric
    figure = training_figure(
        log.dropna(subset=["loss"]),
        log.dropna(subset=[metric]),
        metric=metric,
        best_step=trained.summary["best_step"],
    )
    save_figure(figure, trained.path / "training.png")
    return ["training.png"]
