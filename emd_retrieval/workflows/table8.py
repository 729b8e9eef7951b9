"""``table8``: the paper's retrieval table, cell by cell, and the controls that explain it.

A cell is a run in a folder of its own. Cells that are there are read, the missing ones trained; a
cell that fails is told of and costs no other.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from emd_retrieval._checks import check_choice, check_positive
from emd_retrieval._files import check_folder, write_text
from emd_retrieval.datasets import ImageCollection
from emd_retrieval.progress import progress_counter
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import save_figure
from emd_retrieval.reports.table8 import (
    LOSS_NAMES,
    controls_layout,
    table8_figure,
    table8_latex,
    table8_layout,
)
from emd_retrieval.training import METHODS, Recipe, TrainedModel, build_model, load_recipe
from emd_retrieval.training.model import WEIGHTS_FILE, load_state, read_summary
from emd_retrieval.training.recipe import RANDOM_WEIGHTS
from emd_retrieval.training.trunk_cache import state_checksum
from emd_retrieval.workflows.cell_explorer import choose_cells, explore_cells
from emd_retrieval.workflows.cell_scores import RAW, Cell, CellSummary, summarize_cells
from emd_retrieval.workflows.explorer import EXPLORER_FILE
from emd_retrieval.workflows.recipes import recipe_files
from emd_retrieval.workflows.report import write_report
from emd_retrieval.workflows.train import (
    Machine,
    fit,
    keep_recipe,
    load_data,
    read_scores,
    score,
    write_scores,
)

_LOG = logging.getLogger(__name__)

FAILURE_FILE = "failure.txt"
EVALUATION = "evaluation"
CONTROLS: dict[str, tuple[str, ...]] = {
    "mean": ("similarity=mean",),
    "uniform": ("matching.weights=uniform",),
    "dense": ("matching.coupling=dense",),
    "detached": ("matching.weight_gradient=false",),
    EVALUATION: (),
}
"""What each control does otherwise; ``evaluation`` compares a Raw-trained model by sets."""


@dataclass(frozen=True, kw_only=True)
class Table8:
    """Settings of :func:`run_table8`.

    Attributes:
        recipes: Folder with a recipe a loss.
        runs: Folder of the cells' runs.
        data: Folder of the images; the recipes' by default.
        losses: Which losses; all that have a recipe by default.
        methods: ``"raw"`` and the extractors to hold against it.
        controls: Names in :data:`CONTROLS`, for each method but Raw.
        seeds: Runs of each cell.
        overrides: Settings in place of every recipe's, as ``"section.key=value"``.
        machine: Where to compute.
        report: Queries to keep for the explorer of ``report.html``, which is written as well;
            ``None`` keeps none and writes no page.
        seed: Seed of the bootstrap.
    """

    recipes: Path
    runs: Path
    data: Path | None = None
    losses: Sequence[str] | None = None
    methods: Sequence[str] = METHODS
    controls: Sequence[str] = ()
    seeds: int = 3
    overrides: Sequence[str] = ()
    machine: Machine = field(default_factory=Machine)
    report: int | None = None
    seed: int = 0


def run_table8(
    settings: Table8, output: str | Path | None = None
) -> tuple[ResultRecord, dict[Cell, str]]:
    """Run the cells that are missing, and put all of them into the table.

    Args:
        settings: Which cells, and where.
        output: Folder for the record (markdown, CSV, JSON), ``table8.tex`` and ``table8.png``;
            ``None`` writes nothing but the runs.

    Returns:
        The record, and why each cell that failed did.

    Raises:
        FileNotFoundError: If recipes or data are missing.
        ValueError: If a recipe or a name does not fit; this is found before any cell runs.
        RuntimeError: If every cell failed.
    """
    if output is not None:
        check_folder(output)
    if settings.report is not None:
        check_positive("report", settings.report)
    check_folder(settings.runs, "runs")
    recipes = _recipes(settings)
    training, test = _data(settings, recipes)
    bench = _Bench(settings, recipes, training, test)
    scores: dict[Cell, pd.DataFrame] = {}
    failures: dict[Cell, str] = {}
    with progress_counter("Table 8", total=len(recipes), unit="cell") as bar:
        for cell in recipes:
            bar.set_postfix_str(str(cell))
            failure = settings.runs / str(cell) / FAILURE_FILE
            try:
                scores[cell] = bench.scores(cell)
                failure.unlink(missing_ok=True)
            except Exception as error:  # one cell's failure must not lose the others
                failures[cell] = " ".join(str(error).split()) or type(error).__name__
                _LOG.warning("%s failed: %s", cell, failures[cell])
                write_text(failure, "".join(traceback.format_exception(error)))
            bar.update(1)
    if not scores:
        cell, why = next(iter(failures.items()))
        raise RuntimeError(f"all {len(failures)} cells failed, the first, {cell}: {why}")
    summary = summarize_cells(scores, seed=settings.seed)
    record = _record(settings, recipes, summary, failures, test)
    if output is not None:
        record = _save(record, summary, Path(output))
        if settings.report is not None:
            pair = choose_cells(list(scores))
            if pair is not None:
                explorer = explore_cells(
                    pair, settings.runs, test, settings.machine, queries=settings.report
                )
                explorer.save(Path(output) / EXPLORER_FILE)
            write_report(output, cells=settings.runs)
    return record, failures


class _Bench:
    """Runs cells, or reads those that are there."""

    def __init__(
        self,
        settings: Table8,
        recipes: dict[Cell, Recipe],
        training: ImageCollection,
        test: ImageCollection,
    ) -> None:
        self.settings = settings
        self.recipes = recipes
        self.training = training
        self.test = test
        self._weights: dict[str, str] = {}

    def scores(self, cell: Cell) -> pd.DataFrame:
        """Scores of a cell, a row an image."""
        run = self.settings.runs / str(cell)
        recipe = self.recipes[cell]
        found = read_scores(run, recipe, self.test)
        if found is None:
            machine = self.settings.machine
            if cell.control == EVALUATION:
                model = self._trained_as_raw(cell)
                keep_recipe(run, recipe)
            else:
                model = fit(recipe, run, self.training, machine).model
            found = write_scores(run, score(model, self.test, machine), self.test)
        self._check_weights(cell)
        return found

    def _check_weights(self, cell: Cell) -> None:
        """All cells start from the same weights: those that are given, or the first cell's."""
        recipe = self.recipes[cell]
        if recipe.model.weights == RANDOM_WEIGHTS and self.settings.machine.weights is None:
            return
        trained = replace(cell, method=RAW, control="") if cell.control == EVALUATION else cell
        run = self.settings.runs / str(trained)
        found = read_summary(run)["weights"]["backbone_sha256"]
        name = recipe.model.backbone
        if name not in self._weights:
            self._weights[name] = self._given_weights(recipe) or found
        if found != self._weights[name]:
            raise ValueError(
                f"weights: {run} started from other weights of {name} (backbone {found[:12]}...) "
                f"than this table's ({self._weights[name][:12]}...). Pass the same --weights, or "
                "take another folder for the runs"
            )

    def _given_weights(self, recipe: Recipe) -> str | None:
        file = self.settings.machine.weights
        if file is None and recipe.model.weights is None:
            return None
        return state_checksum(build_model(recipe, weights=file).extractor.backbone)

    def _trained_as_raw(self, cell: Cell) -> TrainedModel:
        """The Raw model of a loss and seed, with the nodes of another method."""
        raw = replace(cell, method=RAW, control="")
        run = self.settings.runs / str(raw)
        read_summary(run)
        # A finished run is only loaded, and refused where recipe, images or weights are others.
        fit(_recipe_of(self.settings, raw), run, self.training, self.settings.machine)
        recipe = self.recipes[cell]
        model = build_model(
            recipe, weights=self.settings.machine.weights, pretrained=recipe.model.frozen_trunk
        )
        load_state(model, run / WEIGHTS_FILE)
        return model


def _recipes(settings: Table8) -> dict[Cell, Recipe]:
    """The recipe of every cell, in the order in which they run: a seed's whole table first."""
    check_positive("seeds", settings.seeds)
    for override in settings.overrides:
        if override.partition("=")[0].strip() == "seed":
            raise ValueError(
                f"overrides: got {override!r}, but a table runs the seeds 0 to N - 1; choose N "
                "(--seeds)"
            )
    if settings.machine.processes > 1:
        raise ValueError(
            f"devices: a table trains each cell on one device, got {settings.machine.processes}; "
            "train single cells on several (emd-retrieval train --run RUNS/LOSS/METHOD/seed0 "
            "--devices N), and the table reads them"
        )
    files = recipe_files(settings.recipes)
    known = [name for name in LOSS_NAMES if name in files]
    known += [name for name in files if name not in LOSS_NAMES]
    losses = known if settings.losses is None else list(dict.fromkeys(settings.losses))
    for loss in losses:
        check_choice("losses", loss, known)
    for method in settings.methods:
        check_choice("methods", method, METHODS)
    for control in settings.controls:
        check_choice("controls", control, tuple(CONTROLS))
    methods = [method for method in METHODS if method in settings.methods]
    recipes = {}
    for seed in range(settings.seeds):
        for loss in losses:
            for method in methods:
                for control in ("", *settings.controls):
                    if control and method == RAW:
                        continue
                    cell = Cell(loss=loss, method=method, control=control, seed=seed)
                    recipes[cell] = _recipe_of(settings, cell, files)
    if not recipes:
        raise ValueError("methods: expected at least one, got none")
    return recipes


def _recipe_of(settings: Table8, cell: Cell, files: Mapping[str, Path] | None = None) -> Recipe:
    files = recipe_files(settings.recipes) if files is None else files
    own = (*settings.overrides, *CONTROLS.get(cell.control, ()), f"seed={cell.seed}")
    return load_recipe(files[cell.loss], method=cell.method, overrides=own)


def _data(settings: Table8, recipes: dict[Cell, Recipe]) -> tuple[ImageCollection, ImageCollection]:
    """The one split that all recipes share."""
    first, recipe = next(iter(recipes.items()))
    for cell, other in recipes.items():
        if other.data != recipe.data:
            raise ValueError(
                f"recipes: {cell} and {first} are of other data or classes; all cells of a table "
                "need the same images"
            )
    return load_data(recipe, settings.data)


def _record(
    settings: Table8,
    recipes: dict[Cell, Recipe],
    summary: CellSummary,
    failures: dict[Cell, str],
    test: ImageCollection,
) -> ResultRecord:
    recipe = next(iter(recipes.values()))
    tables = {"table8": summary.cells, "mean gains": summary.means}
    controls = controls_layout(summary.cells, summary.means)
    if len(controls):
        tables["controls"] = controls
    tables["runs"] = _runs(settings.runs, recipes)
    notes = [
        "Percent. Gains are over Raw of the same loss, paired by query, seeds averaged, with 95 % "
        "bootstrap intervals over queries; ± is the standard deviation over seeds.",
        "Query and gallery are the test images; every pair is compared.",
        "The paper's numbers are of another backbone and of all of CUB: its gains are the claim.",
    ]
    notes += [f"Failed: {cell}: {why}" for cell, why in failures.items()]
    notes += [
        f"{loss}/{variant} lacks seeds ({len(there)} of {settings.seeds}), so that it is not held "
        "against cells that have them."
        for (loss, variant), there in _seeds_of(recipes, failures).items()
        if 0 < len(there) < settings.seeds
    ]
    return ResultRecord(
        name="table8",
        title=f"Table 8 on {recipe.data.name} ({settings.recipes.name})",
        tables=tables,
        summary=table8_layout(summary.cells, summary.means),
        settings={
            "recipes": settings.recipes.name,
            "backbone": recipe.model.backbone,
            "frozen_trunk": recipe.model.frozen_trunk,
            "weights": settings.machine.weights.name if settings.machine.weights else None,
            "seeds": settings.seeds,
            "overrides": list(settings.overrides),
        },
        data={"train": recipe.data.classes_train, "test": test.describe()},
        seed=settings.seed,
        notes=tuple(notes),
    )


def _seeds_of(
    cells: Iterable[Cell], failures: Mapping[Cell, str]
) -> dict[tuple[str, str], list[int]]:
    """Which seeds of each loss and variant did not fail."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        there = seeds.setdefault((cell.loss, cell.variant), [])
        if cell not in failures:
            there.append(cell.seed)
    return seeds


def _runs(folder: Path, recipes: dict[Cell, Recipe]) -> pd.DataFrame:
    """How training went, a row a loss and variant; a value a seed."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cell, recipe in recipes.items():
        try:
            summary = read_summary(folder / str(cell))
        except FileNotFoundError:
            continue
        row = rows.setdefault(
            (cell.loss, cell.variant),
            {"loss": cell.loss, "cell": cell.variant, "steps": [], "validation": [], "seconds": []},
        )
        row["steps"].append(str(summary["best_step"]))
        if summary["validation"] is not None:
            row["validation"].append(f"{summary['validation'][recipe.validation.metric]:.2f}")
        row["seconds"].append(f"{summary['seconds']:.0f}")
    lists = ("steps", "validation", "seconds")
    return pd.DataFrame(
        [{**row, **{name: " ".join(row[name]) for name in lists}} for row in rows.values()]
    )


def _save(record: ResultRecord, summary: CellSummary, output: Path) -> ResultRecord:
    if summary.cells["gain"].notna().any():
        save_figure(table8_figure(summary.cells, summary.means), output / "table8.png")
        record = record.with_figures(["table8.png"])
    write_text(output / "table8.tex", table8_latex(summary.cells, summary.means))
    record.save(output)
    return record
