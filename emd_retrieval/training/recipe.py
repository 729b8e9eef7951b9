"""Recipes: everything that decides a training run, typed, read from YAML and written back.

A recipe says what to do; nothing here does it. Unknown names fail where they are written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emd_retrieval._checks import check_choice, check_positive
from emd_retrieval.features import EXTRACTORS
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.metric_learning import LossSettings, build_loss
from emd_retrieval.settings import (
    build_settings,
    plain_settings,
    read_yaml,
    settings_differences,
    to_yaml,
)

METHODS = ("raw", *EXTRACTORS)
SIMILARITIES = ("emd", "mean")
OPTIMIZERS = ("adamw", "rmsprop")
SCHEDULES = ("cosine", "constant")
PROXY_STARTS = ("random", "class_means")
VALIDATION_METRICS = ("MAP@R", "RP", "P@1")
RANDOM_WEIGHTS = "random"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images.

    Attributes:
        name: What the data are called.
        root: Their folder; ``None`` where it comes from the command line.
        classes_train: Classes to train on, as numbers, ranges and names.
        classes_test: Classes to retrieve.
    """

    name: str = "CUB-200-2011"
    root: str | None = None
    classes_train: str = "1-100"
    classes_test: str = "101-200"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network, and how an image becomes features. Settings of other methods may stay.

    Attributes:
        backbone: A model of :func:`emd_retrieval.features.load_backbone`.
        weights: A local weights file; ``None`` for those of timm's hub, ``"random"`` for none.
        layer: Index of an intermediate feature map; the last one by default.
        method: ``"raw"`` is the pooled vector; ``"fcn"``, ``"grid"`` and ``"sampling"`` are sets.
        pyramid: FCN: levels of the feature pyramid.
        include_map: FCN: append the cells of the map itself.
        grid: Grid: levels of the image pyramid.
        patches: Sampling: patches an image.
        patch_size: Grid and Sampling: side of a patch, in pixels.
        context: Grid: how far a cell is enlarged for evaluation.
        training_context: Grid: the range of it in training; the extractor's own by default.
        scale: Sampling: area of a patch, as shares of the image.
        ratio: Sampling: width over height of a patch.
        embedding_size: Channels of the linear embedder; ``None`` for the backbone's own.
        frozen_trunk: Train the embedder (and proxies) alone, on features that are cached.
        frozen_batch_norm: Keep statistics and scales of batch norms as they were loaded.
    """

    backbone: str = "resnet50.tv_in1k"
    weights: str | None = None
    layer: int | None = None
    method: str = "fcn"
    pyramid: tuple[int, ...] = (3, 2, 1)
    include_map: bool = False
    grid: tuple[int, ...] = (3, 2)
    patches: int = 25
    patch_size: int | None = None
    context: float = 2.0
    training_context: tuple[float, float] | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    embedding_size: int | None = 128
    frozen_trunk: bool = False
    frozen_batch_norm: bool = True

    def __post_init__(self) -> None:
        check_choice("model.method", self.method, METHODS)
        if self.embedding_size is not None:
            check_positive("model.embedding_size", self.embedding_size)
        elif self.frozen_trunk:
            raise ValueError(
                "model.embedding_size: expected a number with frozen_trunk, got null; with the "
                "trunk frozen the embedder is all there is to train"
            )

    @property
    def extractor(self) -> str:
        """The extractor's name. Raw is the pooled vector of FCN, so they share cached features."""
        return "fcn" if self.method == "raw" else self.method


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How images are cut, for whole-image methods (patches are cut as ``model`` says).

    Attributes:
        resize: Short side after resizing, in pixels.
        crop: Side of the crop, in pixels.
        scale: Area of the random crop in training, as shares of the image.
        ratio: Width over height of the random crop.
        flip: Mirror every second view in training.
        cached: With a frozen trunk, how many augmented views of each image are cached.
    """

    resize: int = 256
    crop: int = 227
    scale: tuple[float, float] = (0.16, 1.0)
    ratio: tuple[float, float] = (0.75, 1.33)
    flip: bool = True
    cached: int = 4

    def __post_init__(self) -> None:
        check_positive("views.cached", self.cached)
        if not 0 < self.crop <= self.resize:
            raise ValueError(
                f"views.crop: expected 1 to views.resize = {self.resize} pixels, got {self.crop}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """How the parameters move.

    Attributes:
        optimizer: ``"adamw"`` or ``"rmsprop"``.
        learning_rate: Of the network; its peak.
        proxy_learning_rate: Of proxies, which get no weight decay; as the network by default.
        weight_decay: Of the network.
        momentum: Of RMSprop; AdamW has its usual ones.
        proxy_start: ``"random"``, or ``"class_means"`` of the untrained embeddings.
        proxy_noise: Noise on class means, in units of their root mean square.
        batch_size: Images a batch, over all processes.
        images_per_class: Images of each class in a batch; 1 draws plain random batches.
        steps: Optimiser steps.
        warmup_steps: Steps in which the learning rate rises linearly.
        schedule: ``"cosine"`` falls to zero at the last step, ``"constant"`` stays.
        gradient_clip: Largest norm of the gradient; ``None`` clips nothing.
        bf16: Run the network in bfloat16; losses and distances stay in float32.
        accumulate: Batches whose gradients make one step; a loss sees one batch at a time.
    """

    optimizer: str = "rmsprop"
    learning_rate: float = 1e-6
    proxy_learning_rate: float | None = None
    weight_decay: float = 1e-4
    momentum: float = 0.9
    proxy_start: str = "random"
    proxy_noise: float = 0.0
    batch_size: int = 32
    images_per_class: int = 4
    steps: int = 10_000
    warmup_steps: int = 0
    schedule: str = "constant"
    gradient_clip: float | None = None
    bf16: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_choice("optimization.optimizer", self.optimizer, OPTIMIZERS)
        check_choice("optimization.schedule", self.schedule, SCHEDULES)
        check_choice("optimization.proxy_start", self.proxy_start, PROXY_STARTS)
        for name in ("learning_rate", "batch_size", "images_per_class", "steps", "accumulate"):
            check_positive(f"optimization.{name}", getattr(self, name))
        for name in ("weight_decay", "momentum", "warmup_steps", "proxy_noise"):
            check_positive(f"optimization.{name}", getattr(self, name), allow_zero=True)
        for name in ("gradient_clip", "proxy_learning_rate"):
            if getattr(self, name) is not None:
                check_positive(f"optimization.{name}", getattr(self, name))
        if not self.momentum < 1:
            raise ValueError(f"optimization.momentum: expected below 1, got {self.momentum}")
        if self.batch_size % self.images_per_class or self.batch_size < 2 * self.images_per_class:
            raise ValueError(
                f"optimization.batch_size: expected two classes or more of images_per_class = "
                f"{self.images_per_class}, got {self.batch_size}"
            )

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        return learning_rate_factor(
            step, steps=self.steps, warmup_steps=self.warmup_steps, schedule=self.schedule
        )


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Validation on training classes that are held out.

    Attributes:
        folds: Class-disjoint parts of the training classes; 0 trains on all of them, to the last
            step and without validation.
        fold: The part that is held out.
        seed: Of the division; not the run's seed, so that runs of other seeds compare.
        every: Steps between validations, and between checkpoints.
        patience: Validations without a better value after which training stops.
        metric: What is better when it is higher: ``"MAP@R"``, ``"RP"`` or ``"P@1"``.
    """

    folds: int = 4
    fold: int = 0
    seed: int = 0
    every: int = 100
    patience: int = 9
    metric: str = "MAP@R"

    def __post_init__(self) -> None:
        check_choice("validation.metric", self.metric, VALIDATION_METRICS)
        check_positive("validation.every", self.every)
        check_positive("validation.patience", self.patience)
        if self.folds == 1 or self.folds < 0:
            raise ValueError(
                f"validation.folds: expected 2 or more, or 0 for no validation; got {self.folds}"
            )
        if not 0 <= self.fold < max(1, self.folds):
            raise ValueError(
                f"validation.fold: expected 0 to {max(1, self.folds) - 1}, got {self.fold}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run, whole.

    Attributes:
        data: Which images.
        model: The network, and how an image becomes features.
        views: How images are cut.
        matching: The EMD similarity, of all methods but Raw.
        similarity: ``"emd"``; or the control ``"mean"``, the cosine of the mean of the same nodes.
        loss: The loss and its miner.
        optimization: How the parameters move.
        validation: Held-out training classes.
        seed: Of weights, proxies, batches and views.
        notes: Where hyper-parameters come from, and whatever else a reader should know.

    Raises:
        ValueError: If settings do not go together; the message names them.
    """

    loss: LossSettings
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    matching: EMDMatcher = field(default_factory=EMDMatcher)
    similarity: str = "emd"
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    seed: int = 0
    notes: str = ""

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, SIMILARITIES)
        if self.similarity == "mean" and self.model.method == "raw":
            raise ValueError(
                "similarity: expected 'emd' with method raw, which has no nodes to average "
                "(there it is the cosine of pooled vectors); got 'mean'"
            )
        # A small one of its kind: it checks the parameters' types, and tells of proxies.
        small = build_loss(self.loss, num_classes=2, channels=2)
        has_proxies = bool(small.proxies())
        if self.optimization.images_per_class == 1 and not has_proxies:
            raise ValueError(
                f"optimization.images_per_class: expected 2 or more with the {self.loss.name} "
                f"loss, which has no proxies and learns from pairs; got 1"
            )
        if not has_proxies and self.optimization.proxy_start != "random":
            raise ValueError(
                f"optimization.proxy_start: the {self.loss.name} loss has no proxies; expected "
                f"'random', got {self.optimization.proxy_start!r}"
            )

    @property
    def sets(self) -> bool:
        """Whether images are compared as sets, not by one vector each."""
        return self.model.method != "raw" and self.similarity == "emd"

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, defaults included, in the order of the attributes."""
        order = [f.name for f in dataclasses.fields(self)]
        order.remove("loss")
        order.insert(order.index("similarity") + 1, "loss")
        return {name: plain_settings(getattr(self, name)) for name in order}

    def to_yaml(self) -> str:
        """The recipe as YAML that :func:`read_flat_recipe` reads back to an equal one."""
        return to_yaml(self.to_dict())

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """What two recipes do differently, by dotted key; notes and the size of chunks do nothing.

        Returns:
            This recipe's value and the other's.
        """
        chunks = "matching.memory_mb"
        return settings_differences(self.to_dict(), other.to_dict(), but=[chunks])


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak learning rate: a linear rise, then a half cosine or a constant.

    Example:
        >>> [learning_rate_factor(s, steps=6, warmup_steps=2, schedule="cosine") for s in (0, 1, 2)]
        [0.5, 1.0, 1.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    rest = max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / rest)))


def read_flat_recipe(path: str | Path) -> Recipe:
    """The recipe that a run's folder holds: all in one file, which names no other.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, a name in it is unknown (the nearest one is told), or a value
            does not fit.
    """
    content = read_yaml(path)
    try:
        return recipe_from_dict(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe {path}: {error}") from error


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, as :meth:`Recipe.to_dict` gives them.

    Raises:
        ValueError: If a name is unknown, a value does not fit, or the loss is missing.
    """
    if "loss" not in content:
        raise ValueError("loss: expected a section with a name, got none")
    return build_settings(Recipe, content)
