"""``fewshot pretrain``, ``train``, ``test``: a recipe's stages in folders, and accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from emd_retrieval._checks import check_positive
from emd_retrieval._files import check_folder
from emd_retrieval.datasets import ImageCollection, check_readable
from emd_retrieval.datasets.fewshot import load_fewshot
from emd_retrieval.features import Extractor
from emd_retrieval.fewshot import Episodes, EpisodeScores, draw_episodes, evaluate_episodes
from emd_retrieval.fewshot.named import build_classifier, check_classifier
from emd_retrieval.fewshot.recipe import FewshotRecipe
from emd_retrieval.fewshot.run import (
    FewshotRun,
    Place,
    load_fewshot_run,
    meta_train,
    pretrain,
    with_extractor,
)
from emd_retrieval.fewshot.views import views_of
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.records import ResultRecord
from emd_retrieval.training import TrunkCache
from emd_retrieval.workflows.fewshot_episode import check_episodes, record_episode
from emd_retrieval.workflows.fewshot_recipes import read_fewshot_recipe
from emd_retrieval.workflows.train import Machine


@dataclass(frozen=True, kw_only=True)
class FewshotStage:
    """Settings of :func:`fewshot_pretrain` and :func:`fewshot_train`.

    Attributes:
        recipe: The recipe's YAML file.
        run: Folder of the run; a run that was killed goes on in it.
        start: For :func:`fewshot_train`: folder of the pre-trained run.
        method: ``"fcn"``, ``"grid"`` or ``"sampling"``; the recipe's by default.
        overrides: Settings in place of the recipe's, as ``"section.key=value"``.
        data: Folder of the data set; the recipe's by default.
        machine: Where to compute.
        compiled: Compile the backbone.
    """

    recipe: Path
    run: Path
    start: Path | None = None
    method: str | None = None
    overrides: Sequence[str] = ()
    data: Path | None = None
    machine: Machine = field(default_factory=Machine)
    compiled: bool = False

    @property
    def place(self) -> Place:
        """Where a stage computes."""
        device = torch.device(self.machine.device).type
        return Place(accelerator=device, workers=self.machine.num_workers, compiled=self.compiled)


@dataclass(frozen=True, kw_only=True)
class FewshotTrial:
    """Settings of :func:`fewshot_test`.

    Attributes:
        recipe: The recipe's YAML file: data set, extractor, matcher and test of it count.
        run: Folder of a pre-trained or meta-trained run.
        output: Folder of the record; the run's own by default.
        classifiers: Names of :data:`emd_retrieval.fewshot.named.CLASSIFIERS`; by default DeepEMD's:
            the nearest image at one shot, the structured FC layer at more.
        ways: Classes an episode.
        shots: Support images a class.
        split: Whose classes.
        across: The recipe may be of another data set than the run.
        record: Numbers of episodes whose matches are kept beside the record, for ``explain``.
        method: As for :class:`FewshotStage`.
        overrides: As for :class:`FewshotStage`.
        data: As for :class:`FewshotStage`.
        machine: Where to compute.
    """

    recipe: Path
    run: Path
    output: Path | None = None
    classifiers: Sequence[str] = ()
    ways: Sequence[int] = (5,)
    shots: Sequence[int] = (1,)
    split: str = "test"
    across: bool = False
    record: Sequence[int] = ()
    method: str | None = None
    overrides: Sequence[str] = ()
    data: Path | None = None
    machine: Machine = field(default_factory=Machine)


def fewshot_pretrain(settings: FewshotStage) -> ResultRecord:
    """Pre-train a recipe.

    Raises:
        FileNotFoundError: If recipe, data or weights are missing.
        ValueError: If the recipe does not fit, or the folder holds a run of another one.
    """
    recipe = read_fewshot_recipe(
        settings.recipe, method=settings.method, overrides=settings.overrides
    )
    run = pretrain(
        recipe,
        settings.run,
        data=load_split(recipe, settings.data, "train"),
        validation=load_validation(recipe, settings.data),
        weights=settings.machine.weights,
        place=settings.place,
    )
    return _stage_record(run, recipe, "Pre-training")


def fewshot_train(settings: FewshotStage) -> ResultRecord:
    """Meta-train a recipe from a pre-trained run.

    Raises:
        FileNotFoundError: If recipe, data or the pre-trained run are missing.
        ValueError: If the recipe does not fit, or the folder holds a run of another one.
    """
    recipe = read_fewshot_recipe(
        settings.recipe, method=settings.method, overrides=settings.overrides
    )
    if settings.start is None:
        raise ValueError("start: expected the folder of a pre-trained run, got none")
    run = meta_train(
        recipe,
        settings.run,
        data=load_split(recipe, settings.data, "train"),
        start=load_fewshot_run(settings.start),
        validation=load_validation(recipe, settings.data),
        place=settings.place,
    )
    return _stage_record(run, recipe, "Meta-training")


def fewshot_test(settings: FewshotTrial) -> ResultRecord:
    """Test a run on episodes, from cached features: every classifier, way and shot.

    Raises:
        FileNotFoundError: If recipe, data or run are missing.
        ValueError: If they do not fit each other, or the data cannot give the episodes.
    """
    recipe = read_fewshot_recipe(
        settings.recipe, method=settings.method, overrides=settings.overrides
    )
    output = settings.run if settings.output is None else settings.output
    check_folder(output)
    for name in settings.classifiers:
        check_classifier("classifiers", name)
    run = load_fewshot_run(settings.run)
    if recipe.data.name != run.recipe.data.name and not settings.across:
        raise ValueError(
            f"recipe: {settings.recipe} is for {recipe.data.name}, the run {settings.run} was "
            f"trained on {run.recipe.data.name}; a test across domains must be asked for (across)"
        )
    extractor = with_extractor(run, recipe)
    collection = load_test(recipe, settings.data, settings.split)
    bench = Bench(recipe, extractor, collection, settings.machine)
    # All episodes first: what the data cannot give is told before features are made.
    cells = [
        (way, shot, name, bench.episodes(way, shot))
        for way in settings.ways
        for shot in settings.shots
        for name in settings.classifiers or ("nearest" if shot == 1 else "sfc",)
    ]
    recorded = {(way, shot): episodes for way, shot, _, episodes in cells if settings.record}
    for episodes in recorded.values():
        check_episodes(settings.record, episodes, recipe.matching)
    rows = []
    for way, shot, name, episodes in cells:
        scores = bench.scores(name, episodes)
        rows.append({"classifier": name, "way": way, "shot": shot, **score_columns(scores)})
    record = ResultRecord(
        name="fewshot_test",
        title=f"{run.recipe.data.name} -> {collection.name}, {recipe.model.method}, "
        f"{'pre-trained' if run.summary['stage'] == 'pretrain' else 'meta-trained'}",
        tables={"accuracy": pd.DataFrame(rows)},
        settings={"run": settings.run.name, **extractor.describe(),
                  "matcher": recipe.matching.describe(), "queries": recipe.test.queries},
        data={"test": collection.describe()},
        seed=recipe.test.seed,
        notes=("Percent, mean over episodes with 95 % interval.",),
    )  # fmt: skip
    record.save(output)
    for (way, shot), episodes in recorded.items():
        for number in settings.record:
            found = record_episode(
                recipe.matching, extractor, collection, bench.nodes, episodes, number,
                views=views_of(extractor, recipe.views),
            )  # fmt: skip
            found.save(output / f"episode_{way}way_{shot}shot_{number}.npz")
    return record


@dataclass
class Bench:
    """One extractor on one collection: cached features, fixed episodes.

    Attributes:
        recipe: Its test and matcher.
        extractor: In evaluation mode.
        collection: The images.
        machine: Where to compute.
    """

    recipe: FewshotRecipe
    extractor: Extractor
    collection: ImageCollection
    machine: Machine
    _nodes: Tensor | None = field(default=None, init=False, repr=False)
    _bank: tuple[str, Any] = field(default=("", None), init=False, repr=False)

    @property
    def nodes(self) -> Tensor:
        """Features of all images, made once and kept on disk. Shape: ``[n, N, D]``."""
        if self._nodes is None:
            cache = TrunkCache(
                folder=self.machine.cache,
                extractor=self.extractor,
                views=views_of(self.extractor, self.recipe.views),
                device=self.machine.device,
                bf16=self.recipe.meta_training.bf16,
                workers=self.machine.num_workers,
            )
            store = cache.store(self.collection)
            self._nodes = store.nodes(torch.arange(len(store)))
        return self._nodes

    def episodes(self, way: int, shot: int) -> Episodes:
        """See :func:`trial_episodes`."""
        return trial_episodes(self.recipe, self.collection, way, shot)

    def scores(
        self, name: str, episodes: Episodes, *, matcher: EMDMatcher | None = None
    ) -> EpisodeScores:
        """Accuracy of a classifier.

        Args:
            name: Of :func:`emd_retrieval.fewshot.named.build_classifier`.
            episodes: Of this collection.
            matcher: In place of the recipe's.
        """
        classifier = build_classifier(
            name,
            self.recipe.matching if matcher is None else matcher,
            sfc_learning_rate=self.recipe.test.sfc_learning_rate,
        )
        # Clusters of all images take longer than their episodes: ways and shots share them.
        key = str(classifier.describe())
        if self._bank[0] != key:
            with torch.no_grad():
                self._bank = (key, classifier.prepare(self.nodes))
        return evaluate_episodes(
            classifier,
            self.nodes,
            episodes,
            bank=self._bank[1],
            description=f"{name}, {episodes.way}-way {episodes.shot}-shot",
        )


def trial_episodes(
    recipe: FewshotRecipe, collection: ImageCollection, way: int, shot: int
) -> Episodes:
    """The episodes of a recipe's test; the same for every classifier.

    Raises:
        ValueError: If the data cannot give them.
    """
    for name, value in (("way", way), ("shot", shot)):
        check_positive(name, value)
    try:
        return draw_episodes(
            collection.labels,
            way=way,
            shot=shot,
            queries=recipe.test.queries,
            count=recipe.test.count(shot),
            seed=recipe.test.seed,
        )
    except ValueError as error:
        raise ValueError(f"{collection.name}: {error}") from error


def score_columns(scores: EpisodeScores) -> dict[str, Any]:
    """Columns of a table: how many episodes, percent, half the 95 % interval."""
    return {
        "episodes": len(scores.accuracies),
        "accuracy": round(100 * scores.mean, 3),
        "interval": round(100 * scores.interval, 3),
    }


def load_split(recipe: FewshotRecipe, folder: Path | None, split: str) -> ImageCollection:
    """Images of a split of a recipe's data set, every file looked at.

    Raises:
        FileNotFoundError: If it is not there; what to fetch is told.
        ValueError: If no folder is given, or images are damaged.
    """
    root = recipe.data.root if folder is None else folder
    if root is None:
        raise ValueError(
            f"data: expected the folder of {recipe.data.name}, the recipe names none (data.root)"
        )
    collection = load_fewshot(recipe.data.name, root, split)
    check_readable(collection)
    return collection


def load_test(recipe: FewshotRecipe, folder: Path | None, split: str = "test") -> ImageCollection:
    """What a recipe tests on: a split, or of each of its classes the first images.

    Raises:
        FileNotFoundError: As :func:`load_split`.
        ValueError: As :func:`load_split`.
    """
    collection = load_split(recipe, folder, split)
    if recipe.test.images_per_class is None:
        return collection
    return collection.first_of_each_class(recipe.test.images_per_class)


def load_validation(recipe: FewshotRecipe, folder: Path | None) -> ImageCollection | None:
    """Images of the validation classes, where a recipe validates."""
    return load_split(recipe, folder, "val") if recipe.validation.episodes else None


def _stage_record(run: FewshotRun, recipe: FewshotRecipe, what: str) -> ResultRecord:
    summary = run.summary
    row: dict[str, Any] = {
        "steps": summary["steps"],
        "best step": summary["best_step"],
        "seconds": summary["seconds"],
    }
    if summary["validation"] is not None:
        row |= {
            "validation": round(summary["validation"]["validation"], 3),
            "interval": round(summary["validation"]["interval"], 3),
        }
    record = ResultRecord(
        name=f"fewshot_{summary['stage']}",
        title=f"{what} on {recipe.data.name}, {recipe.model.backbone}, {recipe.model.method}",
        tables={"run": pd.DataFrame([row])},
        settings=recipe.of_stage(summary["stage"]),
        data={"train": summary["data"]},
        seed=recipe.seed,
        notes=(
            f"Validation: {recipe.validation.way}-way 1-shot, {recipe.validation.episodes} fixed "
            "episodes of the validation classes, percent; the weights are those of the best step.",
        ),
    )
    record.save(run.path)
    return record


def shortened(recipe: FewshotRecipe, episodes: int | None) -> FewshotRecipe:
    """The recipe with at most so many episodes in its test."""
    if episodes is None:
        return recipe
    check_positive("episodes", episodes)
    test = replace(
        recipe.test,
        one_shot_episodes=min(episodes, recipe.test.one_shot_episodes),
        episodes=min(episodes, recipe.test.episodes),
    )
    return replace(recipe, test=test)
