"""Few-shot recipes: everything that decides pre-training, meta-training and test, typed.

Read from YAML and written back by the machinery of the retrieval recipes; nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from emd_retrieval._checks import check_choice, check_positive
from emd_retrieval.datasets.fewshot import FEWSHOT_DATASETS
from emd_retrieval.features import EXTRACTORS
from emd_retrieval.fewshot.named import LEARNED, check_classifier
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.settings import build_settings, plain_settings, settings_differences, to_yaml
from emd_retrieval.training import ModelSettings, ViewSettings
from emd_retrieval.training.recipe import RANDOM_WEIGHTS

ROTATIONS = ("none", "augmentation", "self_supervision")
SCHEDULES = ("steps", "cosine")
GRADIENTS = ("exact", "detached", "qp")
SAVED = ("float32", "float16")
STAGES = ("pretrain", "train")


@dataclass(frozen=True, kw_only=True)
class FewshotData:
    """Which data set.

    Attributes:
        name: A name of :func:`emd_retrieval.datasets.fewshot.load_fewshot`.
        root: Its folder; ``None`` where it comes from the command line.
    """

    name: str = "mini_imagenet"
    root: str | None = None

    def __post_init__(self) -> None:
        check_choice("data.name", self.name, list(FEWSHOT_DATASETS))


@dataclass(frozen=True, kw_only=True)
class FewshotModel(ModelSettings):
    """The network, and how an image becomes nodes; all of it is trained, there is no embedder.

    Attributes:
        saved: ``"float32"``, or ``"float16"`` for files of half the size.
    """

    backbone: str = "resnet12"
    weights: str | None = "random"
    pyramid: tuple[int, ...] = ()
    include_map: bool = True
    patches: int = 9
    embedding_size: int | None = None
    frozen_batch_norm: bool = False
    saved: str = "float32"

    def __post_init__(self) -> None:
        check_choice("model.method", self.method, EXTRACTORS)
        check_choice("model.saved", self.saved, SAVED)
        if self.embedding_size is not None or self.frozen_trunk:
            raise ValueError(
                "model.embedding_size, model.frozen_trunk: few-shot training moves the backbone "
                f"itself; expected null and false, got {self.embedding_size} and "
                f"{str(self.frozen_trunk).lower()}"
            )


@dataclass(frozen=True, kw_only=True)
class FewshotViews(ViewSettings):
    """How images are cut; the defaults are the reference code's.

    Whole-image views are cut so. Patches lie on the centre square of the image at its own
    resolution, whatever ``crop`` says, as large as the image allows.
    """

    resize: int = 92
    crop: int = 84
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Classification of the base classes, by SGD with Nesterov momentum.

    Attributes:
        epochs: Passes over the images; 0 takes the network's weights as they come.
        steps: Steps in place of epochs; ``None`` counts epochs.
        batch_size: Images a step.
        learning_rate: Its peak.
        momentum: Of SGD.
        weight_decay: Of SGD.
        schedule: ``"steps"`` multiplies by ``factor`` every ``drop_every`` epochs; ``"cosine"``
            falls to zero.
        drop_every: Epochs.
        factor: See ``schedule``.
        rotation: ``"none"``; ``"augmentation"`` turns images by 0, 90, 180 or 270 degrees;
            ``"self_supervision"`` has a second head tell by how much as well (Table 4).
        rotation_weight: Weight of the loss of that head.
        validate_every: Epochs between validations, and between checkpoints.
        bf16: Run the network in bfloat16.
    """

    epochs: int = 120
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "steps"
    drop_every: int = 30
    factor: float = 0.2
    rotation: str = "none"
    rotation_weight: float = 0.5
    validate_every: int = 1
    bf16: bool = False

    def __post_init__(self) -> None:
        check_choice("pretraining.schedule", self.schedule, SCHEDULES)
        check_choice("pretraining.rotation", self.rotation, ROTATIONS)
        _check_numbers(
            "pretraining", self, ("batch_size", "learning_rate", "drop_every", "factor",
                                  "validate_every"),
            ("epochs", "momentum", "weight_decay", "rotation_weight"),
        )  # fmt: skip
        if self.steps is not None:
            check_positive("pretraining.steps", self.steps)

    def num_steps(self, images: int) -> int:
        """Steps in all."""
        return self.epochs * self.epoch_steps(images) if self.steps is None else self.steps

    def epoch_steps(self, images: int) -> int:
        """Steps an epoch; its last, smaller batch is left to the next one."""
        return max(1, images // self.batch_size)

    def rate(self, step: int, images: int) -> float:
        """Share of the peak learning rate at a step."""
        if self.schedule == "cosine":
            return _cosine(step, self.num_steps(images))
        return float(self.factor ** (step // (self.drop_every * self.epoch_steps(images))))


@dataclass(frozen=True, kw_only=True)
class MetaTraining:
    """Episodes of the base classes, by SGD with Nesterov momentum.

    Attributes:
        classifier: What classifies the queries, by gradients through it: ``"nearest"`` is DeepEMD.
        way: Classes an episode.
        shot: Support images a class.
        queries: Query images a class (the reference code's 15; the paper says 16).
        episodes: Episodes in all.
        accumulate: Episodes whose gradients make one step.
        learning_rate: Its peak.
        momentum: Of SGD.
        weight_decay: Of SGD.
        schedule: ``"steps"`` multiplies by ``factor`` every ``drop_every`` episodes; ``"cosine"``
            falls to zero.
        drop_every: Episodes.
        factor: See ``schedule``.
        gradient: ``"exact"``: the duals' gradient reaches costs and weights; ``"detached"``: the
            weights get none, as on the reference code's OpenCV path; ``"qp"``: the regularised
            problem of its QPTH path, differentiated implicitly.
        validate_every: Episodes between validations, and between checkpoints.
        bf16: Run the network in bfloat16; the transport problems stay in float32.
    """

    classifier: str = "nearest"
    way: int = 5
    shot: int = 1
    queries: int = 15
    episodes: int = 5000
    accumulate: int = 1
    learning_rate: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "steps"
    drop_every: int = 500
    factor: float = 0.5
    gradient: str = "exact"
    validate_every: int = 50
    bf16: bool = False

    def __post_init__(self) -> None:
        check_classifier("meta_training.classifier", self.classifier)
        if self.classifier in LEARNED:
            raise ValueError(
                f"meta_training.classifier: {self.classifier!r} is learned from the support images "
                "at test, gradients do not reach the features through it; pre-train, then test"
            )
        check_choice("meta_training.schedule", self.schedule, SCHEDULES)
        check_choice("meta_training.gradient", self.gradient, GRADIENTS)
        _check_numbers(
            "meta_training", self, ("way", "shot", "queries", "episodes", "accumulate",
                                    "learning_rate", "drop_every", "factor", "validate_every"),
            ("momentum", "weight_decay"),
        )  # fmt: skip
        if self.episodes % self.accumulate:
            raise ValueError(
                f"meta_training.episodes: expected a multiple of accumulate = {self.accumulate}, "
                f"got {self.episodes}"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.episodes // self.accumulate

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        if self.schedule == "cosine":
            return _cosine(step, self.steps)
        return float(self.factor ** (step * self.accumulate // self.drop_every))

    def matcher(self, matching: EMDMatcher) -> EMDMatcher:
        """The matcher with the gradient that was chosen."""
        if self.gradient == "detached":
            return replace(matching, weight_gradient=False)
        return replace(matching, solver="qp") if self.gradient == "qp" else matching


@dataclass(frozen=True, kw_only=True)
class FewshotValidation:
    """Fixed 1-shot episodes of the validation classes, by which the best weights are kept.

    Attributes:
        way: Classes an episode.
        queries: Query images a class.
        episodes: How many; 0 validates nothing and keeps the last weights.
        images_per_class: Only so many images a class take part, the first; all by default.
        seed: Of the episodes; not the run's, so that runs of other seeds compare.
    """

    way: int = 5
    queries: int = 15
    episodes: int = 600
    images_per_class: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        _check_numbers("validation", self, ("way", "queries"), ("episodes",))
        if self.images_per_class is not None:
            check_positive("validation.images_per_class", self.images_per_class)


@dataclass(frozen=True, kw_only=True)
class FewshotTest:
    """Episodes of the test classes.

    Attributes:
        queries: Query images a class.
        one_shot_episodes: How many at one shot.
        episodes: How many at more shots.
        images_per_class: Only so many images a class take part, the first; all by default, as in
            the protocol. Where patches are many, a CPU is done sooner with fewer.
        sfc_learning_rate: Of the structured FC layer; the reference code's evaluation script's.
        seed: Of the episodes.
    """

    queries: int = 15
    one_shot_episodes: int = 5000
    episodes: int = 600
    images_per_class: int | None = None
    sfc_learning_rate: float = 100.0
    seed: int = 2

    def __post_init__(self) -> None:
        names = ("queries", "one_shot_episodes", "episodes", "sfc_learning_rate")
        _check_numbers("test", self, names, ())
        if self.images_per_class is not None:
            check_positive("test.images_per_class", self.images_per_class)

    def count(self, shot: int) -> int:
        """Episodes at so many shots."""
        return self.one_shot_episodes if shot == 1 else self.episodes


@dataclass(frozen=True, kw_only=True)
class FewshotRecipe:
    """A few-shot experiment, whole.

    Attributes:
        data: Which data set.
        model: The network, and how an image becomes nodes.
        views: How images are cut.
        matching: The EMD similarity.
        pretraining: The first stage.
        meta_training: The second stage.
        validation: How the best weights are found.
        test: The episodes of the test.
        seed: Of weights, batches, episodes of training and views.
        notes: Where settings come from.
    """

    data: FewshotData = field(default_factory=FewshotData)
    model: FewshotModel = field(default_factory=FewshotModel)
    views: FewshotViews = field(default_factory=FewshotViews)
    matching: EMDMatcher = field(default_factory=EMDMatcher)
    pretraining: Pretraining = field(default_factory=Pretraining)
    meta_training: MetaTraining = field(default_factory=MetaTraining)
    validation: FewshotValidation = field(default_factory=FewshotValidation)
    test: FewshotTest = field(default_factory=FewshotTest)
    seed: int = 0
    notes: str = ""

    def __post_init__(self) -> None:
        untrained = self.pretraining.epochs == 0 and self.pretraining.steps is None
        if untrained and self.model.weights == RANDOM_WEIGHTS:
            raise ValueError(
                "pretraining.epochs: expected a positive value where model.weights is "
                f"{RANDOM_WEIGHTS!r}, got 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, defaults included."""
        return {f.name: plain_settings(getattr(self, f.name)) for f in fields(self)}

    def to_yaml(self) -> str:
        """The recipe as YAML that reads back to an equal one."""
        return to_yaml(self.to_dict())

    def of_stage(self, stage: str) -> dict[str, Any]:
        """What decides the outcome of a stage. Pre-training is the same for every extractor."""
        content = self.to_dict()
        # Where the data lie is no matter of what they are; the test decides nothing, nor do chunks.
        del content["data"]["root"], content["test"], content["notes"]
        del content["matching"]["memory_mb"]
        if stage == "pretrain":
            del content["meta_training"]
            content["model"] = {
                name: content["model"][name] for name in ("backbone", "weights", "layer", "saved")
            }
        else:
            # They are those of the run that it starts from, or nobody's.
            del content["pretraining"], content["model"]["weights"]
        return content

    def differences(self, other: FewshotRecipe, stage: str) -> dict[str, tuple[Any, Any]]:
        """What two recipes do differently in a stage, by dotted key: ours and the other's."""
        return settings_differences(self.of_stage(stage), other.of_stage(stage))


def fewshot_recipe_from_dict(content: Mapping[str, Any]) -> FewshotRecipe:
    """A recipe from plain values, as :meth:`FewshotRecipe.to_dict` gives them.

    Raises:
        ValueError: If a name is unknown (the nearest one is told) or a value does not fit.
    """
    return build_settings(FewshotRecipe, content)


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _check_numbers(
    section: str, settings: Any, positive: tuple[str, ...], or_zero: tuple[str, ...]
) -> None:
    for name in positive:
        check_positive(f"{section}.{name}", getattr(settings, name))
    for name in or_zero:
        check_positive(f"{section}.{name}", getattr(settings, name), allow_zero=True)
