"""One training run: from a recipe to a folder that is a model. Killed, it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from emd_retrieval._checksums import check_checkpoint
from emd_retrieval._files import check_folder, write_text
from emd_retrieval.datasets import ImageCollection, ImageDataset
from emd_retrieval.features import FeatureSet, extract_features
from emd_retrieval.features.extraction import default_workers
from emd_retrieval.metric_learning import MetricLoss, build_loss
from emd_retrieval.records import package_versions
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.training.draws import BatchDraw, generator_of, split_classes
from emd_retrieval.training.lightning_tools import StepProgress, quiet_lightning, torch_threads
from emd_retrieval.training.model import (
    RECIPE_FILE,
    SUMMARY_FILE,
    WEIGHTS_FILE,
    FeatureEmbedding,
    ImageEmbedding,
    TrainedModel,
    build_model,
    embed_store,
    load_model,
    load_state,
    loss_nodes,
    read_summary,
    save_state,
    weights_record,
    write_summary,
)
from emd_retrieval.training.monitor import BEST_FILE, CHECKPOINT_FILE, Monitor
from emd_retrieval.training.recipe import Recipe, read_flat_recipe
from emd_retrieval.training.run_lock import only_writer
from emd_retrieval.training.task import (
    CachedInputs,
    DecodedInputs,
    MetricLearningTask,
    TrainingData,
    gather,
)
from emd_retrieval.training.trunk_cache import FeatureTable, TrunkCache

_LOG = logging.getLogger(__name__)
_TABLES = {"emd": "nodes", "mean": "mean", "pooled": "pooled"}


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        path: Its folder: ``model.safetensors``, ``recipe.yaml``, ``run.json`` and ``log.csv``.
        model: With its best weights.
        summary: ``run.json``: steps, best step, validation metrics, weights, data, versions.
        is_first: False in all but one of the processes that trained together; what is to be done
            once is left to that one.
    """

    path: Path
    model: TrainedModel
    summary: dict[str, Any]
    is_first: bool = True


def train(
    recipe: Recipe,
    run: str | Path,
    *,
    data: ImageCollection,
    cache: str | Path | None = None,
    weights: str | Path | None = None,
    accelerator: str = "cpu",
    devices: int | Sequence[int] = 1,
    nodes: int = 1,
    strategy: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    compiled: bool = False,
    keep_checkpoint: bool = False,
    description: str | None = "training",
) -> TrainedRun:
    """Train by a recipe, or go on with a run that was killed; a finished one is loaded.

    A run that goes on ends in the numbers of one that was never killed: what is random follows
    from seed and step, and the rest is in the checkpoint.

    Args:
        recipe: What to do.
        run: The run's folder.
        data: The training classes (:func:`load_recipe_data`); validation holds some of them out.
        cache: Folder of cached features of a frozen trunk, which runs may share; ``cache`` beside
            the run's folder by default.
        weights: The backbone's file, in place of the recipe's.
        accelerator: Lightning's name of the device kind: ``"cpu"``, ``"cuda"``, ``"auto"``.
        devices: How many of them, or which; each is a process with its share of every batch.
        nodes: How many machines; on each the same call runs with the same number of devices, and
            Lightning finds the others by the environment (``torchrun``, SLURM, or ``MASTER_ADDR``,
            ``MASTER_PORT`` and ``NODE_RANK``).
        strategy: Lightning's strategy; its DDP for several devices.
        workers: Decoding processes; by the machine's cores by default.
        threads: CPU threads of torch; as they are by default.
        compiled: Compile a frozen trunk for the features that are still missing
            (:func:`~emd_retrieval.training.compiled.compile_trunk`).
        keep_checkpoint: Leave the last checkpoint, with the optimiser's state, in a finished run.
        description: Name of the progress bar.

    Raises:
        FileNotFoundError: If the weights' file is absent.
        NonFiniteLossError: If a loss is not finite; the batch is saved in the run's folder.
        StoreLockedError: If another process trains in the run's folder.
        ValueError: If the folder holds a run of another recipe or other data (the differing keys
            are told), there are too few classes, or a setting does not fit.
    """
    run = Path(run)
    check_folder(run, "run")
    described = data.describe()
    _check_same_run(recipe, run, described)
    if (run / SUMMARY_FILE).is_file():
        _clear(run, keep_checkpoint)  # it may have been killed just before
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        return TrainedRun(run, load_model(run, weights=weights), read_summary(run), first)
    with only_writer(run):
        model = build_model(recipe, weights=weights)
        write_text(run / RECIPE_FILE, recipe.to_yaml())
        started = weights_record(model, weights)
        parts = _divide(recipe, data)
        device = _device(accelerator, devices)
        # Before DDP lays out its buckets: changed later, as validation would, gradients are
        # scrambled.
        model.extractor.to(device).to(memory_format=torch.channels_last)
        folder = run.parent / "cache" if cache is None else Path(cache)
        source: _Cached | _Decoded
        if recipe.model.frozen_trunk:
            source = _Cached.of(model, data, folder, device, workers, compiled)
        else:
            source = _Decoded(
                model, data, device, default_workers() if workers is None else workers
            )
        network = (FeatureEmbedding if recipe.model.frozen_trunk else ImageEmbedding)(model)
        task = MetricLearningTask(
            network, _loss(model, source, parts), recipe.optimization, run=run, seed=recipe.seed
        )
        origin = {"images": described["sha256"], "weights": started["backbone_sha256"]}
        monitor = _monitor(model, source, parts, run, origin)
        batches = TrainingData(
            parts.draw,
            parts.train_labels,
            parts.train_rows,
            source.inputs(parts.draw),
            accumulate=recipe.optimization.accumulate,
            workers=workers,
        )
        began = time.monotonic()
        grouped = torch.distributed.is_initialized()
        trainer = _fit(
            task, batches, monitor, run, accelerator, devices, nodes, strategy, threads, description
        )
        if trainer.is_global_zero:
            if monitor.best is not None:
                load_state(model, run / BEST_FILE)
            model.extractor.cpu()
            save_state(model, run / WEIGHTS_FILE)
            write_summary(
                run,
                {
                    "steps": trainer.global_step,
                    "best_step": monitor.best_step if monitor.best else trainer.global_step,
                    "stopped_early": monitor.stopped,
                    "validation": monitor.best,
                    "held_out_classes": [data.class_names[c] for c in parts.held_out.tolist()],
                    "weights": started,
                    "data": described,
                    "seconds": round(time.monotonic() - began, 1),
                    "processes": trainer.world_size,
                    "versions": package_versions(),
                },
            )
            _clear(run, keep_checkpoint)
        trainer.strategy.barrier()
    if torch.distributed.is_initialized() and not grouped:
        # What follows is one process's work; a later run may be of other processes.
        torch.distributed.destroy_process_group()
    return TrainedRun(
        run, load_model(run, weights=weights), read_summary(run), trainer.is_global_zero
    )


def _clear(run: Path, keep_checkpoint: bool) -> None:
    """Remove what a finished run does not need: it is loaded, never gone on with."""
    (run / BEST_FILE).unlink(missing_ok=True)
    if not keep_checkpoint:
        (run / CHECKPOINT_FILE).unlink(missing_ok=True)


def _check_same_run(recipe: Recipe, run: Path, data: dict[str, Any]) -> None:
    """Refuse to go on with what another recipe, or other data, began."""
    if not (run / RECIPE_FILE).is_file():
        if (run / CHECKPOINT_FILE).is_file():
            raise ValueError(
                f"run: {run} has a checkpoint and no {RECIPE_FILE}; take another folder"
            )
        return
    differences = recipe.differences(read_flat_recipe(run / RECIPE_FILE))
    if differences:
        shown = "; ".join(
            f"{key}: {mine!r} here, {theirs!r} there" for key, (mine, theirs) in differences.items()
        )
        raise ValueError(
            f"run: {run} holds a run of another recipe ({shown}). Take another folder, or remove "
            f"that one"
        )
    if (run / SUMMARY_FILE).is_file() and read_summary(run)["data"]["sha256"] != data["sha256"]:
        raise ValueError(f"run: {run} was trained on other images than {data['name']} has now")


@dataclass(frozen=True)
class _Parts:
    """Training and held-out images of a collection, by class."""

    held_out: Tensor
    train_rows: Tensor
    train_labels: Tensor
    validation_rows: Tensor
    validation_labels: Tensor
    num_classes: int
    draw: BatchDraw


def _divide(recipe: Recipe, data: ImageCollection) -> _Parts:
    labels = torch.from_numpy(data.labels.copy())
    present = labels.unique()
    settings = recipe.validation
    kept, held_out = split_classes(
        len(present), folds=settings.folds, fold=settings.fold, seed=settings.seed
    )
    kept, held_out = present[kept], present[held_out]
    train_rows = torch.isin(labels, kept).nonzero().squeeze(1)
    validation_rows = torch.isin(labels, held_out).nonzero().squeeze(1)
    # Proxies are counted from 0 over the classes that are trained on.
    train_labels = torch.searchsorted(kept, labels[train_rows])
    draw = BatchDraw(
        train_labels,
        batch_size=recipe.optimization.batch_size,
        images_per_class=recipe.optimization.images_per_class,
        seed=recipe.seed,
    )
    return _Parts(
        held_out,
        train_rows,
        train_labels,
        validation_rows,
        labels[validation_rows],
        len(kept),
        draw,
    )


@dataclass(frozen=True)
class _Cached:
    """A frozen trunk: everything comes from cached features."""

    model: TrainedModel
    cache: TrunkCache
    data: ImageCollection

    @classmethod
    def of(
        cls,
        model: TrainedModel,
        data: ImageCollection,
        folder: Path,
        device: torch.device,
        workers: int | None,
        compiled: bool,
    ) -> _Cached:
        cache = TrunkCache(
            folder=folder,
            extractor=model.extractor,
            views=model.recipe.views,
            device=device,
            bf16=model.recipe.optimization.bf16,
            workers=workers,
            compiled=compiled,
        )
        return cls(model, cache, data)

    def inputs(self, draw: BatchDraw) -> CachedInputs:
        """Augmented views for training."""
        views = range(self.model.recipe.views.cached)
        stores = [self.cache.store(self.data, view) for view in views]
        return CachedInputs(FeatureTable(stores, _TABLES[self.model.similarity]), draw)

    @cached_property
    def _evaluation(self) -> LocalFeatureStore:
        return self.cache.store(self.data)

    def features(self, rows: Tensor, labels: Tensor) -> FeatureSet:
        """Embedded evaluation views."""
        return embed_store(self.model, self._evaluation, rows, labels)


@dataclass(frozen=True)
class _Decoded:
    """Full fine-tuning: everything comes from the images."""

    model: TrainedModel
    data: ImageCollection
    device: torch.device
    workers: int

    def inputs(self, draw: BatchDraw) -> DecodedInputs:
        """Augmented views for training."""
        views, extractor = self.model.recipe.views, self.model.extractor
        transform = extractor.training_transform(
            resize=views.resize,
            crop=views.crop,
            scale=views.scale,
            ratio=views.ratio,
            flip=views.flip,
        )
        return DecodedInputs(self.data, transform, self.model.recipe.seed)

    def features(self, rows: Tensor, labels: Tensor) -> FeatureSet:
        """Embedded evaluation views; on several processes each embeds its share."""
        rank, world = _rank_and_world()
        # Every process has as many, so that they can be gathered; the last ones are repeated.
        share = -(-len(rows) // world)
        places = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(rows) - 1)
        views = self.model.recipe.views
        transform = self.model.extractor.evaluation_transform(resize=views.resize, crop=views.crop)
        part = self.data.subset(rows[places].numpy().astype(np.int64))
        device = next(self.model.extractor.parameters()).device
        found = extract_features(
            ImageDataset(part, transform),
            self.model.extractor,
            device=device,
            bf16=self.model.recipe.optimization.bf16,
            num_workers=self.workers,
            description="validating",
        )
        nodes, vectors = (
            gather(values.to(device)).cpu()[: len(rows)]
            for values in (found.nodes, found.global_vectors)
        )
        return FeatureSet(nodes, vectors, labels, rows)


def _loss(model: TrainedModel, source: _Cached | _Decoded, parts: _Parts) -> MetricLoss:
    recipe = model.recipe
    nodes = loss_nodes(model)
    loss = build_loss(
        recipe.loss,
        num_classes=parts.num_classes,
        channels=model.extractor.channels,
        nodes=nodes,
        matcher=None if nodes is None else recipe.matching,
        generator=generator_of("proxies", recipe.seed),
    )
    if recipe.optimization.proxy_start == "class_means":
        features = source.features(parts.train_rows, parts.train_labels)
        embeddings = model.embeddings(features.nodes, features.global_vectors)
        means = torch.stack(
            [embeddings[parts.train_labels == c].mean(dim=0) for c in range(parts.num_classes)]
        )
        loss.initialize_proxies(
            means,
            noise=recipe.optimization.proxy_noise,
            generator=generator_of("proxy noise", recipe.seed),
        )
    return loss


def _monitor(
    model: TrainedModel,
    source: _Cached | _Decoded,
    parts: _Parts,
    run: Path,
    origin: dict[str, str],
) -> Monitor:
    recipe = model.recipe

    def validate() -> dict[str, float]:
        features = source.features(parts.validation_rows, parts.validation_labels)
        return model.evaluate(features).mean

    return Monitor(
        run,
        recipe.validation,
        recipe.optimization.steps,
        validate if len(parts.held_out) else None,
        lambda path: save_state(model, path),
        origin=origin,
    )


def _fit(
    task: MetricLearningTask,
    batches: TrainingData,
    monitor: Monitor,
    run: Path,
    accelerator: str,
    devices: int | Sequence[int],
    nodes: int,
    strategy: str | None,
    threads: int | None,
    description: str | None,
) -> Any:
    settings = task.settings
    checkpoint = run / CHECKPOINT_FILE
    if strategy is None:
        count = devices if isinstance(devices, int) else len(devices)
        strategy = "ddp" if count * nodes > 1 else "auto"
    callbacks: list[Any] = [monitor]
    if description is not None:
        callbacks.append(StepProgress(description, settings.steps))
    with quiet_lightning(), torch_threads(threads), torch.random.fork_rng():
        trainer = lightning.Trainer(
            max_steps=settings.steps,
            max_epochs=-1,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.gradient_clip,
            accelerator=accelerator,
            devices=devices if isinstance(devices, int) else list(devices),
            num_nodes=nodes,
            strategy=strategy,
            precision="bf16-mixed" if settings.bf16 else "32-true",
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        # Models are built in evaluation mode, and Lightning leaves the mode as it is.
        task.train()
        resume = str(checkpoint) if checkpoint.is_file() else None
        if resume is not None:
            check_checkpoint(checkpoint)
            _LOG.info("going on from %s", checkpoint)
        trainer.fit(task, batches, ckpt_path=resume, weights_only=True)
    task.eval()
    return trainer


def _device(accelerator: str, devices: int | Sequence[int]) -> torch.device:
    """Where features are made before the processes of several devices start."""
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator in ("gpu", "cuda"):
        if not torch.cuda.is_available():
            raise ValueError("accelerator: this machine has no CUDA device; expected 'cpu'")
        return torch.device("cuda", 0 if isinstance(devices, int) else devices[0])
    return torch.device(accelerator)


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
