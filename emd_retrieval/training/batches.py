"""Batches for metric learning: P classes of K images each, drawn from images held in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from emd_retrieval._checks import check_positive, check_tensor


class ImageBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of P classes with K images each, flipped and jittered at random.

    PML's sampler does the same draw from one global generator; here the seed is the caller's, and
    two runs with one seed see the same batches.

    Args:
        images: RGB pixels. Shape: ``[n, 3, h, w]``, uint8.
        labels: Shape: ``[n]``, an integer dtype.
        classes_per_batch: P.
        images_per_class: K; a class with fewer is drawn from with repeats.
        mean: Subtracted from pixels in [0, 1], one a channel.
        std: Divides them.
        shift: Largest random translation, as a share of the side; zero moves nothing.
        seed: Seed of the draw and the augmentation.

    Yields:
        Normalised images ``[P * K, 3, h, w]``, float32, and labels ``[P * K]``.

    Raises:
        ValueError: If shapes do not fit or there are fewer than P classes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        classes_per_batch: int,
        images_per_class: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shift: float = 0.0,
        seed: int = 0,
    ) -> None:
        sizes = check_tensor("images", images, ["n", 3, "h", "w"], floating=False)
        check_tensor("labels", labels, ["n"], sizes=sizes, floating=False)
        check_positive("images_per_class", images_per_class)
        self.classes = torch.unique(labels)
        if not 2 <= classes_per_batch <= len(self.classes):
            raise ValueError(
                f"classes_per_batch: expected 2 to {len(self.classes)} (the classes there are; one "
                f"class alone has no negatives), got {classes_per_batch}"
            )
        self.images = images
        self.labels = labels
        self.members = [(labels == label).nonzero().squeeze(1) for label in self.classes]
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)
        self.shift = shift
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            rows = self._draw(generator)
            yield self._augment(self.images[rows], generator), self.labels[rows]

    def _draw(self, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(self.members), generator=generator)[: self.classes_per_batch]
        rows = []
        for place in chosen.tolist():
            members = self.members[place]
            order = torch.randperm(len(members), generator=generator)
            repeats = -(-self.images_per_class // len(members))
            rows.append(members[order.repeat(repeats)[: self.images_per_class]])
        return torch.cat(rows)

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        most = round(self.shift * images.shape[3])
        if most:
            padded = torch.nn.functional.pad(images.float(), [most] * 4, mode="replicate")
            offsets = torch.randint(2 * most + 1, (len(images), 2), generator=generator)
            height, width = images.shape[2:]
            images = torch.stack(
                [
                    image[:, top : top + height, left : left + width]
                    for image, (top, left) in zip(padded, offsets.tolist(), strict=True)
                ]
            )
        return (images.float() / 255 - self.mean) / self.std
