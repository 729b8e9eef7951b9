"""The Lightning modules of a recipe: the task with its loss, and the data with their batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from emd_retrieval._files import whole_file
from emd_retrieval.datasets import ImageCollection
from emd_retrieval.features.extraction import default_workers
from emd_retrieval.features.transforms import Training
from emd_retrieval.metric_learning import MetricLoss
from emd_retrieval.training.depthwise import DepthwiseInFloat32
from emd_retrieval.training.draws import BatchDraw, generator_of, number_of
from emd_retrieval.training.recipe import OptimizationSettings
from emd_retrieval.training.trunk_cache import FeatureTable

NON_FINITE_FILE = "non_finite_batch.safetensors"

Batch = tuple[Tensor, Tensor, Tensor]
"""Views or cached features, labels ``[B]`` and rows ``[B]`` in the collection."""


class NonFiniteLossError(ValueError):
    """A loss or an embedding is NaN or infinite; the batch is saved for inspection."""


class MetricLearningTask(lightning.LightningModule):
    """A network and a metric-learning loss.

    On several processes each embeds its share of a batch, gathers those of the others and computes
    the loss of the whole batch, so that every pair counts, as on one process. The gradient of the
    own share is scaled by the number of processes, since DDP averages.

    Args:
        network: From a batch's inputs to embeddings ``[B, width]``.
        loss: Takes embeddings and labels.
        settings: How the parameters move.
        run: Folder for a batch whose loss is not finite.
        seed: Of whatever the network draws, dropout for instance.

    Raises:
        NonFiniteLossError: While training, if the loss or an embedding is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: MetricLoss,
        settings: OptimizationSettings,
        *,
        run: Path,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.settings = settings
        self.run = run
        self.seed = seed

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch: embeddings of all processes, the loss, a check that it is finite."""
        inputs, labels, rows = batch
        # What is random in the network then depends on the step alone, not on what ran before.
        self._seed(number_of("network", self.seed, batch_idx, self.global_rank))
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        images_on_cpu = inputs.ndim > 3 and inputs.device.type == "cpu"
        with DepthwiseInFloat32() if images_on_cpu else nullcontext():
            embeddings = gather(self.network(inputs).float())
        labels, rows = gather(labels), gather(rows)
        if not bool(torch.isfinite(embeddings).all()):
            raise self._not_finite("an embedding is", embeddings, labels, rows)
        value: Tensor = self.loss(embeddings, labels)
        if not bool(torch.isfinite(value)):
            raise self._not_finite(
                f"the {self.loss.settings.name} loss is {float(value)},", embeddings, labels, rows
            )
        return value

    def configure_optimizers(self) -> Any:
        """Network and proxies by their own learning rates, proxies without weight decay."""
        settings = self.settings
        proxies = self.loss.proxies()
        network = [p for p in self.network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": network, "lr": settings.learning_rate}]
        if proxies:
            rate = settings.proxy_learning_rate
            rate = settings.learning_rate if rate is None else rate
            groups.append({"params": proxies, "lr": rate, "weight_decay": 0.0})
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
        else:
            optimizer = torch.optim.RMSprop(
                groups, weight_decay=settings.weight_decay, momentum=settings.momentum
            )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm. Lightning refuses to with a fused optimizer in bf16, where it may."""
        if gradient_clip_val is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def _seed(self, number: int) -> None:
        # torch.manual_seed would queue a call, with a stack trace, for every kind of device that is
        # not in use; that takes longer than the embedder.
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def _not_finite(
        self, what: str, embeddings: Tensor, labels: Tensor, rows: Tensor
    ) -> NonFiniteLossError:
        file = self.run / NON_FINITE_FILE
        if self.global_rank == 0:
            with whole_file(file) as partial:
                save_file(
                    {
                        "embeddings": embeddings.detach().cpu().contiguous(),
                        "labels": labels.cpu().contiguous(),
                        "rows": rows.cpu().contiguous(),
                    },
                    partial,
                )
        return NonFiniteLossError(
            f"loss: {what} not finite at step {self.global_step}; the batch's embeddings, labels "
            f"and rows are in {file}. Lower the learning rate "
            f"({self.settings.learning_rate:g}), or set gradient_clip"
        )


def gather(values: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients reach the own rows.

    Every process must go on to compute the same scalar from the result. The gradient of the own
    rows is scaled by the number of processes, so that DDP's average is that of one process.

    Shape:
        ``[b, ...]`` to ``[world * b, ...]``.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    gathered: Tensor = _Gather.apply(values)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        world = torch.distributed.get_world_size()
        parts = [torch.empty_like(values) for _ in range(world)]
        torch.distributed.all_gather(parts, values.contiguous())
        context.size = len(values)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        own = gradient[rank * context.size : (rank + 1) * context.size]
        return own * world


@dataclass(frozen=True)
class CachedInputs:
    """Training inputs from cached trunk features.

    Attributes:
        table: Features of all views of the collection.
        draw: Which view an image has in which batch.
    """

    table: FeatureTable
    draw: BatchDraw

    def at(self, number: int, places: slice, rows: Tensor) -> Tensor:
        """Features of a share of a batch."""
        views = self.draw.views(number, self.table.num_views)[places]
        return self.table.at(rows, views)


@dataclass(frozen=True)
class DecodedInputs:
    """Training inputs from image files.

    Attributes:
        collection: The images.
        transform: From an image and a generator to views.
        seed: Of the views.
    """

    collection: ImageCollection
    transform: Training
    seed: int

    def at(self, number: int, places: slice, rows: Tensor) -> Tensor:
        """Views of a share of a batch; an image that is in it twice has two views."""
        numbers = range(places.start, places.stop)
        return torch.stack(
            [
                self.transform(
                    self.collection.load(row), generator_of("image", self.seed, number, place)
                )
                for place, row in zip(numbers, rows.tolist(), strict=True)
            ]
        )


class TrainingData(lightning.LightningDataModule):
    """Batches of a run, from the step where it stands; each process gets its share of each.

    Args:
        draw: Which images are in a batch, as places in ``rows``.
        labels: Class of each training image, from 0. Shape: ``[n]``.
        rows: Where the training images are in the collection. Shape: ``[n]``.
        inputs: What a batch is made of.
        accumulate: Batches a step.
        workers: Decoding processes; by the machine's cores by default, none for cached features.
    """

    def __init__(
        self,
        draw: BatchDraw,
        labels: Tensor,
        rows: Tensor,
        inputs: CachedInputs | DecodedInputs,
        *,
        accumulate: int = 1,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.draw = draw
        self.labels = labels
        self.rows = rows
        self.inputs = inputs
        self.accumulate = accumulate
        cached = isinstance(inputs, CachedInputs)
        self.workers = 0 if cached else default_workers() if workers is None else workers

    def train_dataloader(self) -> DataLoader[Any]:
        """The endless batches from the trainer's step on.

        Raises:
            ValueError: If a batch cannot be shared out evenly.
        """
        trainer: Any = self.trainer
        rank, world = trainer.global_rank, trainer.world_size
        if self.draw.batch_size % world:
            raise ValueError(
                f"batch_size: expected a multiple of the {world} processes, "
                f"got {self.draw.batch_size}"
            )
        share = self.draw.batch_size // world
        stream = _Stream(
            self, trainer.global_step * self.accumulate, slice(rank * share, (rank + 1) * share)
        )
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda",
        )


class _Stream(IterableDataset[Batch]):
    """Shares of batches, by their numbers; each worker process makes every W-th of them."""

    def __init__(self, data: TrainingData, start: int, places: slice) -> None:
        self.draw, self.inputs = data.draw, data.inputs
        self.labels, self.rows = data.labels, data.rows
        self.start = start
        self.places = places

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number = self.start + (0 if worker is None else worker.id)
        while True:
            chosen = self.draw.rows(number)[self.places]
            rows = self.rows[chosen]
            yield self.inputs.at(number, self.places, rows), self.labels[chosen], rows
            number += 1 if worker is None else worker.num_workers
