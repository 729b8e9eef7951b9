"""The two stages of training as Lightning modules: pre-training and meta-training.

What a batch is follows from its number alone, so that a resumed run is the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from emd_retrieval.features import Extractor
from emd_retrieval.fewshot.classifier import EpisodeClassifier
from emd_retrieval.fewshot.episodes import Episodes
from emd_retrieval.fewshot.recipe import MetaTraining, Pretraining
from emd_retrieval.fewshot.views import ViewSource
from emd_retrieval.training import NonFiniteLossError
from emd_retrieval.training.draws import BatchDraw, generator_of, number_of

Batch = tuple[int, Tensor, Tensor]
"""Its number, what the source fetched, and labels ``[b]``."""


class Stage(lightning.LightningModule):
    """What both stages share: SGD, the rate, a check of the loss, accuracy beside it.

    Args:
        extractor: Whose backbone is trained.
        source: Finishes the views on the device.
        settings: Rates of SGD.
        rate: Share of the peak learning rate at a step.
        seed: Of whatever the network draws, dropout for instance.
    """

    def __init__(
        self,
        extractor: Extractor,
        source: ViewSource,
        settings: Pretraining | MetaTraining,
        rate: Callable[[int], float],
        seed: int,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.source = source
        self.settings = settings
        self.rate = rate
        self.seed = seed

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One batch.

        Raises:
            NonFiniteLossError: If the loss is not finite.
        """
        number, fetched, labels = batch
        # What is random in the network then depends on the batch alone, not on what ran before.
        torch.manual_seed(number_of("network", self.seed, number))
        loss, logits = self.learn(number, self.source.finish(number, fetched), labels)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLossError(
                f"loss: {float(loss.detach())} at batch {number}; lower the learning rate "
                f"({self.settings.learning_rate:g})"
            )
        hits = logits.detach().argmax(dim=1) == labels
        return {"loss": loss, "accuracy": hits.float().mean()}

    def learn(self, number: int, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """SGD with Nesterov momentum."""
        settings = self.settings
        optimizer = torch.optim.SGD(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class PretrainingStage(Stage):
    """A linear classifier over the base classes, and where asked for one over rotations.

    Args:
        extractor: See :class:`Stage`; its pooled vector is classified.
        source: See :class:`Stage`.
        settings: See :class:`Stage`.
        images: Training images, which say how long an epoch is.
        classes: Base classes.
        seed: Of the heads and rotations.
    """

    def __init__(
        self,
        extractor: Extractor,
        source: ViewSource,
        settings: Pretraining,
        *,
        images: int,
        classes: int,
        seed: int,
    ) -> None:
        super().__init__(
            extractor, source, settings, lambda step: settings.rate(step, images), seed
        )
        self.rotation = settings.rotation
        self.rotation_weight = settings.rotation_weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number_of("heads", seed))
            self.classifier = nn.Linear(extractor.channels, classes)
            self.rotations = (
                nn.Linear(extractor.channels, 4) if self.rotation == "self_supervision" else None
            )

    def learn(self, number: int, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies. Shape of the logits: ``[b, classes]``."""
        turns = None
        if self.rotation != "none":
            turns = torch.randint(
                4, (len(views),), generator=generator_of("turns", self.seed, number)
            ).to(views.device)
            views = rotate(views, turns)
        pooled = self.extractor.with_global(views)[1]
        logits = self.classifier(pooled)
        loss = F.cross_entropy(logits.float(), labels)
        if self.rotations is not None and turns is not None:
            told = F.cross_entropy(self.rotations(pooled).float(), turns)
            loss = loss + self.rotation_weight * told
        return loss, logits


class MetaTrainingStage(Stage):
    """Episodes of base classes, classified from their support images.

    Args:
        extractor: See :class:`Stage`; its nodes are classified.
        source: See :class:`Stage`.
        settings: See :class:`Stage`.
        classifier: Differentiable in the features.
        seed: See :class:`Stage`.
        frozen_batch_norm: Keep batch norms as pre-training left them.
    """

    def __init__(
        self,
        extractor: Extractor,
        source: ViewSource,
        settings: MetaTraining,
        classifier: EpisodeClassifier[Any],
        *,
        seed: int,
        frozen_batch_norm: bool,
    ) -> None:
        super().__init__(extractor, source, settings, settings.rate, seed)
        self.way, self.shot = settings.way, settings.shot
        self.classifier = classifier
        self.frozen_batch_norm = frozen_batch_norm

    def learn(self, number: int, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the queries. Shape of the logits: ``[Q, way]``."""
        nodes = self.extractor(views).float()
        support = nodes[: self.way * self.shot].unflatten(0, (1, self.way, self.shot))
        query = nodes[self.way * self.shot :].unsqueeze(0)
        logits = self.classifier(support, query)[0]
        return F.cross_entropy(logits, labels), logits

    def train(self, mode: bool = True) -> MetaTrainingStage:
        """Training mode, in which frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_batch_norm:
            for part in self.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        return self


def rotate(views: Tensor, turns: Tensor) -> Tensor:
    """Turn square views by quarters, counter-clockwise.

    Shape:
        ``[b, 3, h, h]`` and ``[b]``, from 0 to 3, to ``[b, 3, h, h]``.
    """
    turned = views.clone()
    for quarter in (1, 2, 3):
        chosen = turns == quarter
        turned[chosen] = torch.rot90(views[chosen], quarter, dims=(2, 3))
    return turned


class ImageBatches:
    """Random batches of labelled images.

    Args:
        labels: Class of each image. Shape: ``[n]``.
        batch_size: Images a batch.
        seed: Of the draws.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int) -> None:
        self.draw = BatchDraw(labels, batch_size=batch_size, images_per_class=1, seed=seed)
        self.labels = labels

    def at(self, number: int) -> tuple[Tensor, Tensor]:
        """Rows and labels of a batch."""
        rows = self.draw.rows(number)
        return rows, self.labels[rows]


class EpisodeBatches:
    """One episode a batch, support images first; labels are those of its queries.

    Args:
        episodes: All of them.
    """

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes

    def at(self, number: int) -> tuple[Tensor, Tensor]:
        """Rows of an episode, and labels of its queries."""
        place = number % len(self.episodes)
        support, query = self.episodes.support[place], self.episodes.query[place]
        return torch.cat([support.flatten(), query.flatten()]), self.episodes.query_labels


class StageData(lightning.LightningDataModule):
    """Batches from the step where the trainer stands.

    Args:
        batches: Which images a batch has.
        source: What it has of them.
        accumulate: Batches a step.
        workers: Loading processes.
    """

    def __init__(
        self,
        batches: ImageBatches | EpisodeBatches,
        source: ViewSource,
        *,
        accumulate: int,
        workers: int,
    ) -> None:
        super().__init__()
        self.batches = batches
        self.source = source
        self.accumulate = accumulate
        self.workers = workers

    def train_dataloader(self) -> DataLoader[Any]:
        """The endless batches."""
        trainer: Any = self.trainer
        stream = _Stream(self.batches, self.source, trainer.global_step * self.accumulate)
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )


class _Stream(IterableDataset[Batch]):
    """Batches by their numbers; each worker process makes every W-th of them."""

    def __init__(
        self, batches: ImageBatches | EpisodeBatches, source: ViewSource, start: int
    ) -> None:
        self.batches = batches
        self.source = source
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number = self.start + (0 if worker is None else worker.id)
        while True:
            rows, labels = self.batches.at(number)
            yield number, self.source.fetch(number, rows), labels
            number += 1 if worker is None else worker.num_workers
