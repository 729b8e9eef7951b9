"""Training an extractor with a pytorch-metric-learning loss, pooled (Raw) or as sets (DeepEMD)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from emd_retrieval._checks import check_positive
from emd_retrieval.features import FCNExtractor, pack
from emd_retrieval.training.lightning_tools import StepProgress, quiet_lightning, torch_threads
from emd_retrieval.training.recipe import learning_rate_factor


@dataclass(frozen=True)
class TrainingSchedule:
    """How long and how fast to train.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Peak learning rate of AdamW; it warms up linearly and falls as a half cosine.
        weight_decay: AdamW's weight decay.
        warmup_steps: Steps of the warm-up.
    """

    steps: int
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        check_positive("steps", self.steps)
        check_positive("learning_rate", self.learning_rate)
        check_positive("weight_decay", self.weight_decay, allow_zero=True)
        check_positive("warmup_steps", self.warmup_steps, allow_zero=True)

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        return learning_rate_factor(
            step, steps=self.steps, warmup_steps=self.warmup_steps, schedule="cosine"
        )


class EmbeddingTask(lightning.LightningModule):
    """An extractor and a loss, as Lightning wants them.

    Args:
        extractor: What is trained.
        loss: A PML loss of ``(embeddings [B, width], labels [B])``. For sets its distance must take
            packed sets, for instance :class:`emd_retrieval.metric_learning.DeepEMDSimilarity`.
        schedule: How long and how fast.
        pooled: Train the pooled global vector ``[B, D]`` (Raw) instead of packed sets ``[B, N *
            D]``.
        miner: A PML miner.

    Raises:
        ValueError: While training, if a loss is not finite.
    """

    def __init__(
        self,
        extractor: FCNExtractor,
        loss: nn.Module,
        schedule: TrainingSchedule,
        *,
        pooled: bool = False,
        miner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.loss = loss
        self.miner = miner
        self.schedule = schedule
        self.pooled = pooled
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch: local features, the loss, a check that it is finite."""
        images, labels = batch
        images = images.contiguous(memory_format=torch.channels_last)
        nodes, pooled = self.extractor.with_global(images)
        embeddings = (pooled if self.pooled else pack(nodes)).float()
        mined = self.miner(embeddings, labels) if self.miner is not None else None
        value: Tensor = self.loss(embeddings, labels, mined)
        number = float(value.detach())
        if not math.isfinite(number):
            raise ValueError(
                f"loss: {type(self.loss).__name__} is {number} at step {batch_idx}; lower the "
                f"learning rate ({self.schedule.learning_rate}) or check the images"
            )
        self.losses.append(number)
        return value

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and a half cosine, stepped every batch."""
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.schedule.learning_rate,
            weight_decay=self.schedule.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train_embedding(
    task: EmbeddingTask,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    description: str = "training",
    accelerator: str = "cpu",
    bf16: bool = False,
    threads: int | None = None,
) -> EmbeddingTask:
    """Train a task for its schedule's steps.

    Args:
        task: What to train; it is changed in place and left in evaluation mode.
        batches: For instance an :class:`ImageBatches`; they start again where they run out.
        description: Name of the progress bar.
        accelerator: Lightning's name of the device kind.
        bf16: Run the network in bfloat16; losses and distances stay in float32.
        threads: CPU threads of torch while training; as they are by default. For a small network
            one is best: the others gain little and stall every step where the machine is busy.

    Returns:
        The task.

    Raises:
        ValueError: If the loss is not finite.
    """
    task.extractor.to(memory_format=torch.channels_last)
    with quiet_lightning(), torch_threads(threads):
        trainer = lightning.Trainer(
            max_steps=task.schedule.steps,
            max_epochs=-1,
            gradient_clip_val=5.0,
            accelerator=accelerator,
            devices=1,
            precision="bf16-mixed" if bf16 else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StepProgress(description, task.schedule.steps)],
        )
        loader = torch.utils.data.DataLoader(_Wrapped(batches), batch_size=None)
        trainer.fit(task, loader)
    task.eval()
    return task


class _Wrapped(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Any iterable as what a data loader takes."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)
