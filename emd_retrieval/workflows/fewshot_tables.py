"""``fewshot table N`` and ``fewshot figure 5``: run what is missing, then our numbers and theirs.

Runs and scores lie in one folder under names made of what decides them, so tables share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from emd_retrieval._checks import check_positive
from emd_retrieval._files import check_folder, write_text
from emd_retrieval.datasets import ImageCollection
from emd_retrieval.fewshot import Episodes
from emd_retrieval.fewshot.recipe import FewshotRecipe
from emd_retrieval.fewshot.run import FewshotRun, Place, meta_train, pretrain, with_extractor
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.matching.clusters import cluster_nodes
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import save_figure
from emd_retrieval.reports.fewshot import fewshot_layout, paper_fewshot, shots_figure
from emd_retrieval.training.trunk_cache import state_checksum
from emd_retrieval.workflows.fewshot import (
    Bench,
    load_split,
    load_test,
    load_validation,
    score_columns,
    shortened,
    trial_episodes,
)
from emd_retrieval.workflows.fewshot_recipes import read_fewshot_recipe
from emd_retrieval.workflows.train import Machine

TABLES = (1, 2, 3, 4, 5, 7)
STAGES = ("pretrain", "train")
# Images whose clusters are counted for Table 2.
_COUNTED = 200
# Of Mean-shift, in units of the root mean square of an image's node norms.
_BANDWIDTHS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


@dataclass(frozen=True, kw_only=True)
class FewshotTable:
    """Settings of :func:`fewshot_table` and :func:`fewshot_figure`.

    Attributes:
        recipe: The recipe's YAML file.
        runs: Folder of runs and scores, shared by all tables.
        stage: ``"train"``: rows are meta-trained, each with its own classifier and extractor;
            ``"pretrain"``: all rows are of pre-trained weights. Table 2 is ``"pretrain"`` always.
        episodes: At most so many test episodes a cell.
        rows: Only rows whose name contains one of these; all by default.
        shots: Of the figure.
        overrides: Settings in place of the recipe's, as ``"section.key=value"``.
        data: Folder of the data set; the recipe's by default.
        target: Table 5: name of the data set that it is tested on.
        target_data: Table 5: its folder.
        machine: Where to compute.
    """

    recipe: Path
    runs: Path
    stage: str = "train"
    episodes: int | None = None
    rows: Sequence[str] = ()
    shots: Sequence[int] = (1, 2, 3, 5, 10)
    overrides: Sequence[str] = ()
    data: Path | None = None
    target: str = "cub"
    target_data: Path | None = None
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of a table: how it is trained, and how it classifies."""

    name: str
    method: str = "fcn"
    changes: tuple[str, ...] = ()
    trained_as: str = "nearest"
    stage: str | None = None
    one_shot: str = "nearest"
    more_shots: str | None = None
    matcher: EMDMatcher | None = None

    def classifier(self, shot: int) -> str:
        return self.one_shot if shot == 1 or self.more_shots is None else self.more_shots


def fewshot_table(number: int, settings: FewshotTable, output: Path) -> ResultRecord:
    """A table of the paper on a recipe's data: train what is missing, test, lay out.

    Raises:
        FileNotFoundError: If recipe or data are missing.
        ValueError: If there is no such table, or the data cannot give the episodes.
    """
    if number not in TABLES:
        known = ", ".join(str(table) for table in TABLES)
        raise ValueError(
            f"table: expected one of {known}, got {number} (6 is of time: benchmarks/table6.py)"
        )
    check_folder(output)
    work = _Work(settings)
    rows = _chosen(_rows(number, work.recipe(())), settings.rows)
    shots = (1, 5) if number in (5, 7) else (1,)
    ways = (5,) if number in (5, 7) else (5, 10)
    target = work.target() if number == 5 else work.test()
    cells = work.cells(rows, [(way, shot) for way in ways for shot in shots], target)
    paper = paper_fewshot(number)
    if number == 7:
        paper = paper[paper["data"] == work.recipe(()).data.name]
    record = work.record(f"fewshot_table{number}", f"Table {number}", cells, target)
    record = replace(record, summary=fewshot_layout(cells, paper))
    record.save(output)
    return record


def fewshot_figure(settings: FewshotTable, output: Path) -> ResultRecord:
    """Figure 5 on a recipe's data: accuracy by number of support images.

    Raises:
        FileNotFoundError: If recipe or data are missing.
        ValueError: If the data cannot give the episodes.
    """
    check_folder(output)
    work = _Work(settings)
    rows = _chosen(
        [
            _Row(name="EMD + NN"),
            _Row(name="EMD + Fusion", one_shot="fusion"),
            _Row(name="EMD + Merge", one_shot="merge"),
            _Row(name="EMD prototype", one_shot="prototype"),
            _Row(name="EMD + SFC", one_shot="sfc"),
            _Row(name="cosine classifier", one_shot="fc_cosine"),
        ],
        settings.rows,
    )
    target = work.test()
    cells = work.cells(rows, [(5, shot) for shot in settings.shots], target)
    record = work.record("fewshot_figure5", "Figure 5", cells, target)
    save_figure(shots_figure(cells), output / "fewshot_figure5.png")
    empty = pd.DataFrame(columns=["row", "way", "shot", "accuracy", "interval"])
    layout = fewshot_layout(cells, empty)
    layout = layout[[name for name in layout.columns if not name.startswith("paper's")]]
    record = replace(record, summary=layout).with_figures(["fewshot_figure5.png"])
    record.save(output)
    return record


def _rows(number: int, recipe: FewshotRecipe) -> list[_Row]:
    if number == 1:
        return [
            _Row(name="ProtoNet", trained_as="proto_net", one_shot="proto_net"),
            _Row(name="MatchingNet", trained_as="matching_net", one_shot="matching_net"),
            _Row(name="FC, dot", stage="pretrain", one_shot="fc_dot"),
            _Row(name="FC, cosine", stage="pretrain", one_shot="fc_cosine"),
            _Row(name="KNN", trained_as="knn", one_shot="knn"),
            _Row(name="Prediction Fusion", trained_as="prediction_fusion",
                 one_shot="prediction_fusion"),
            _Row(name="DeepEMD-FCN"),
        ]  # fmt: skip
    if number == 2:
        return _weight_rows(recipe.matching)
    if number == 3:
        return _extractor_rows()
    if number == 4:
        return [
            _Row(name=name + label, method=method, changes=(f"pretraining.rotation={rotation}",))
            for name, method in (("FCN", "fcn"), ("Grid", "grid"), ("Sampling", "sampling"))
            for label, rotation in (
                ("", "none"), (", rotation", "augmentation"),
                (", self-supervision", "self_supervision"),
            )
        ]  # fmt: skip
    if number == 5:
        return [
            _Row(name="ProtoNet", trained_as="proto_net", one_shot="proto_net"),
            _Row(name="MatchingNet", trained_as="matching_net", one_shot="matching_net"),
            _Row(name="cosine classifier", stage="pretrain", one_shot="fc_cosine"),
            _Row(name="linear classifier", stage="pretrain", one_shot="fc_dot"),
            _Row(name="KNN", trained_as="knn", one_shot="knn"),
            _Row(name="DeepEMD-FCN", more_shots="sfc"),
        ]
    return [
        _Row(name=f"DeepEMD-{name}", method=method, more_shots="sfc")
        for name, method in (("FCN", "fcn"), ("Grid", "grid"), ("Sampling", "sampling"))
    ]


def _weight_rows(matching: EMDMatcher) -> list[_Row]:
    """Table 2. Only with cross-reference weights is the paper's own mechanism at work."""

    def row(name: str, **changes: Any) -> _Row:
        return _Row(name=name, stage="pretrain", matcher=replace(matching, **changes))

    shift = {"weights": "mean_shift", "clusters": 25}
    return [
        row("DC, average", coupling="dense", weights="uniform"),
        row("DC, CR", coupling="dense", weights="cross_reference"),
        row("EMD, equal", weights="uniform"),
        *(
            row(f"EMD, K-means (K = {count})", weights="k_means", clusters=count)
            for count in (25, 10, 5, 2, 1)
        ),
        row("EMD, Mean-shift (BD = 0)", bandwidth=1e-6, **shift),
        *(row(f"EMD, Mean-shift (BD = {width:g} rms)", bandwidth=width, **shift)
          for width in _BANDWIDTHS),
        row("EMD, Mean-shift (BD = inf)", bandwidth=1e6, **shift),
        row("EMD, Mean-shift (auto BD)", bandwidth=None, **shift),
        row("EMD, CR", weights="cross_reference"),
    ]  # fmt: skip


def _extractor_rows() -> list[_Row]:
    """Table 3. The level 5 of a feature pyramid is the map itself."""
    maps = [("5 x 5", ""), ("pyramid (5, 3)", "3"), ("pyramid (5, 2)", "2"),
            ("pyramid (5, 2, 1)", "2, 1")]  # fmt: skip
    levels_of_grids = ("3, 2", "5, 3", "5, 2", "5, 3, 2")
    grids = [(f"{side} x {side}", f"{side}") for side in (6, 5, 4, 3, 2)]
    grids += [(f"pyramid ({levels})", levels) for levels in levels_of_grids]
    return [
        *(_Row(name=f"FCN, {name}", changes=(f"model.pyramid=[{levels}]",))
          for name, levels in maps),
        *(_Row(name=f"Grid, {name}", method="grid", changes=(f"model.grid=[{levels}]",))
          for name, levels in grids),
        *(_Row(name=f"Sampling, {count} patches", method="sampling",
               changes=(f"model.patches={count}",))
          for count in (9, 16, 25)),
    ]  # fmt: skip


def _chosen(rows: list[_Row], parts: Sequence[str]) -> list[_Row]:
    chosen = [row for row in rows if not parts or any(part in row.name for part in parts)]
    if not chosen:
        raise ValueError(
            f"rows: {', '.join(parts)} is in no name; they are: {'; '.join(r.name for r in rows)}"
        )
    return chosen


class _Work:
    """Runs and scores of a recipe, made where they are missing."""

    def __init__(self, settings: FewshotTable) -> None:
        if settings.stage not in STAGES:
            raise ValueError(f"stage: expected pretrain or train, got {settings.stage!r}")
        for shot in settings.shots:
            check_positive("shots", shot)
        self.settings = settings
        self.place = Place(
            accelerator=torch.device(settings.machine.device).type,
            workers=settings.machine.num_workers,
        )
        self._splits: dict[str, ImageCollection | None] = {}

    def recipe(self, changes: tuple[str, ...], method: str = "fcn") -> FewshotRecipe:
        """The recipe for a row. What a table varies counts more than what was asked for by hand."""
        overrides = (*self.settings.overrides, *changes)
        recipe = read_fewshot_recipe(self.settings.recipe, method=method, overrides=overrides)
        return shortened(recipe, self.settings.episodes)

    def test(self) -> ImageCollection:
        """The test classes."""
        return load_test(self.recipe(()), self.settings.data)

    def target(self) -> ImageCollection:
        """The test classes of the other data set."""
        recipe = self.recipe((f"data.name={self.settings.target}", "data.root=null"))
        return load_test(recipe, self.settings.target_data)

    def cells(
        self, rows: list[_Row], tasks: list[tuple[int, int]], collection: ImageCollection
    ) -> pd.DataFrame:
        """Scores of every row at every way and shot."""
        # All episodes first: what the data cannot give is told before anything is trained.
        recipe = self.recipe(())
        episodes = {task: trial_episodes(recipe, collection, *task) for task in tasks}
        found: list[dict[str, Any]] = []
        for row in rows:
            recipe = self.recipe(row.changes, row.method)
            run = self._trained(recipe, row)
            bench = Bench(recipe, with_extractor(run, recipe), collection, self.settings.machine)
            counted = self._mean_clusters(bench, row)
            for way, shot in tasks:
                scores = self._scores(bench, row, episodes[way, shot])
                found.append({"row": row.name, "way": way, "shot": shot, **scores, **counted,
                              "run": run.path.name})  # fmt: skip
        return pd.DataFrame(found)

    def record(
        self, name: str, title: str, cells: pd.DataFrame, collection: ImageCollection
    ) -> ResultRecord:
        """The record, without its layout."""
        recipe = self.recipe(())
        stage = "pre-trained" if name == "fewshot_table2" else f"stage {self.settings.stage}"
        return ResultRecord(
            name=name,
            title=f"{title} on {recipe.data.name}, {recipe.model.backbone}, "
            f"{recipe.views.crop} px, {stage}",
            tables={"cells": cells},
            settings={"recipe": self.settings.recipe.name, "stage": self.settings.stage,
                      "overrides": list(self.settings.overrides),
                      "pretraining": recipe.to_dict()["pretraining"],
                      "meta_training": recipe.to_dict()["meta_training"],
                      "test": recipe.to_dict()["test"]},
            data={"test": collection.describe()},
            seed=recipe.seed,
            notes=("Percent, mean over episodes with 95 % interval.",
                   "The paper's numbers are of its own data, image size and schedule: the order of "
                   "the methods is what can be compared."),
        )  # fmt: skip

    def _trained(self, recipe: FewshotRecipe, row: _Row) -> FewshotRun:
        start = pretrain(
            recipe,
            self.settings.runs / f"pretrain_{_key(recipe.of_stage('pretrain'))}",
            data=self._split("train"),
            validation=self._validation(),
            weights=self.settings.machine.weights,
            place=self.place,
            description=f"pre-training for {row.name}",
        )
        if (row.stage or self.settings.stage) == "pretrain":
            return start
        meta = replace(recipe.meta_training, classifier=row.trained_as)
        recipe = replace(recipe, meta_training=meta)
        key = _key({"start": start.path.name, **recipe.of_stage("train")})
        return meta_train(
            recipe,
            self.settings.runs / f"train_{key}",
            data=self._split("train"),
            start=start,
            validation=self._validation(),
            place=self.place,
            description=f"meta-training of {row.name}",
        )

    def _split(self, split: str) -> ImageCollection:
        found = self._splits.get(split)
        if found is None:
            found = self._splits[split] = load_split(self.recipe(()), self.settings.data, split)
        return found

    def _validation(self) -> ImageCollection | None:
        if "val" not in self._splits:
            self._splits["val"] = load_validation(self.recipe(()), self.settings.data)
        return self._splits["val"]

    def _scores(self, bench: Bench, row: _Row, episodes: Episodes) -> dict[str, Any]:
        """Scores of a cell; they are kept, so that a killed table goes on."""
        classifier = row.classifier(episodes.shot)
        matcher = bench.recipe.matching if row.matcher is None else row.matcher
        decided = {
            "weights": state_checksum(bench.extractor),
            "extractor": bench.extractor.describe(),
            "views": bench.recipe.to_dict()["views"],
            "bf16": bench.recipe.meta_training.bf16,
            "classifier": classifier,
            "matcher": matcher.describe(),
            "test": bench.recipe.to_dict()["test"],
            "task": [episodes.way, episodes.shot, len(episodes)],
            "images": bench.collection.describe()["sha256"],
        }
        file = self.settings.runs / "scores" / f"{_key(decided)}.json"
        if file.is_file():
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return kept
        found = score_columns(bench.scores(classifier, episodes, matcher=matcher))
        write_text(file, json.dumps(found) + "\n")
        return found

    def _mean_clusters(self, bench: Bench, row: _Row) -> dict[str, Any]:
        """Mean number of clusters an image, over the first ones; only where clusters are made."""
        matcher = row.matcher
        if matcher is None or matcher.weights not in ("k_means", "mean_shift"):
            return {}
        found = cluster_nodes(
            bench.nodes[:_COUNTED],
            matcher.weights,
            clusters=matcher.clusters,
            bandwidth=matcher.bandwidth,
        )
        return {"mean clusters": round(float(found.counts.float().mean()), 2)}


def _key(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
