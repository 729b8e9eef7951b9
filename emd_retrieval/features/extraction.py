"""Running an extractor over a data set: batches in, one :class:`FeatureSet` out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from emd_retrieval._checks import check_positive, check_tensor
from emd_retrieval.features.extractor import Extractor
from emd_retrieval.progress import progress_counter


@dataclass(frozen=True)
class FeatureSet:
    """Local features of many images, with their global vectors and labels.

    Attributes:
        nodes: Local features. Shape: ``[n, N, D]``, float32.
        global_vectors: One vector an image; not normalised. Shape: ``[n, G]``, float32.
        labels: Class of each image. Shape: ``[n]``, int64.
        ids: Row of each image in the collection it came from. Shape: ``[n]``, int64.
    """

    nodes: Tensor
    global_vectors: Tensor
    labels: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        sizes = check_tensor("nodes", self.nodes, ["n", "N", "D"])
        for name, dims in (("global_vectors", ["n", "G"]), ("labels", ["n"]), ("ids", ["n"])):
            check_tensor(
                name, getattr(self, name), dims, sizes=sizes, floating=name == "global_vectors"
            )

    def __len__(self) -> int:
        return len(self.nodes)

    def subset(self, rows: Tensor) -> FeatureSet:
        """The images at ``rows`` (indices or a mask). Shape: ``[m]``."""
        return replace(
            self,
            nodes=self.nodes[rows],
            global_vectors=self.global_vectors[rows],
            labels=self.labels[rows],
            ids=self.ids[rows],
        )


def extract_features(
    dataset: Dataset[Any],
    extractor: Extractor,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    num_workers: int = 0,
    description: str = "extracting",
) -> FeatureSet:
    """Extract local features and global vectors of every image.

    Args:
        dataset: Yields ``(views, label, row)``, views as the extractor's ``evaluation_transform``
            makes them.
        extractor: Put into evaluation mode for the run, and back.
        batch_size: Images a forward pass.
        device: Where the extractor runs. The result is on the CPU.
        bf16: Run the backbone in bfloat16; results are float32 again.
        num_workers: Processes that decode images; 0 decodes in this one.
        description: Name of the progress bar.

    Raises:
        ValueError: If a feature is not finite; the images are named by their rows. If there are no
            images, or ``batch_size`` is not positive.
    """
    check_positive("batch_size", batch_size)
    device = torch.device(device)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    total = len(dataset)  # type: ignore[arg-type]
    extractor = extractor.to(device).to(memory_format=torch.channels_last)
    nodes, pooled, labels, rows = [], [], [], []
    with (
        _evaluating(extractor),
        torch.inference_mode(),
        progress_counter(description, total=total, unit="image") as bar,
    ):
        for views, label, row in loader:
            views = views.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                batch_nodes, batch_pooled = extractor.with_global(views)
            _check_batch(batch_nodes, row)
            nodes.append(batch_nodes.float().cpu())
            pooled.append(batch_pooled.float().cpu())
            labels.append(torch.as_tensor(label))
            rows.append(torch.as_tensor(row))
            bar.update(len(views))
    if not nodes:
        raise ValueError("dataset: expected at least one image, got none")
    # Cloned, because inference-mode tensors cannot take part in training later.
    return FeatureSet(*(torch.cat(part).clone() for part in (nodes, pooled, labels, rows)))


def default_workers() -> int:
    """Decoding processes for this machine: one a core beyond the first two, eight at most."""
    return (
        max(0, min(8, len(os.sched_getaffinity(0)) - 2)) if hasattr(os, "sched_getaffinity") else 0
    )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back for each part by itself: frozen batch norms stay frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _check_batch(nodes: Tensor, rows: Tensor) -> None:
    finite = torch.isfinite(nodes).flatten(1).all(dim=1).cpu()
    if not bool(finite.all()):
        bad = torch.as_tensor(rows)[~finite].tolist()
        raise ValueError(
            f"features: the backbone gave NaN or infinite features for {len(bad)} image(s) of a "
            f"batch, the first at row {bad[0]}. Check the weights, or run without bf16"
        )
