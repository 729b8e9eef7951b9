"""Features of a frozen trunk on disk: one store for each collection and view, whoever asks.

What decides a feature decides the store's name: weights, extractor, view and images. So recipes,
losses and seeds share stores, and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from emd_retrieval.datasets import ImageCollection
from emd_retrieval.features import Extractor
from emd_retrieval.features.extraction import default_workers
from emd_retrieval.progress import progress_counter
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.retrieval.store import StoreLockedError, StoreWriter
from emd_retrieval.training.compiled import compile_trunk
from emd_retrieval.training.draws import generator_of
from emd_retrieval.training.recipe import ViewSettings

_LOG = logging.getLogger(__name__)
_FORMAT = 2
# Up to here the features of a run are held in memory; beyond, they are read from the files.
_RESIDENT_BYTES = 4 * 2**30
_CONTENTS: WeakKeyDictionary[ImageCollection, str] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class TrunkCache:
    """Where features of a frozen trunk are kept, and how missing ones are made.

    A killed process leaves what it has finished, and the next one goes on from there. Of two
    processes that need the same store, one fills it and the other waits.

    Attributes:
        folder: The stores lie in here.
        extractor: Its trunk; the embedder plays no part.
        views: How images are cut.
        batch_size: Images a forward pass.
        device: Where the trunk runs.
        bf16: Run it in bfloat16.
        workers: Decoding processes; by the machine's cores by default.
        compiled: Run the trunk as compiled code (:func:`compile_trunk`): on a CPU several times as
            fast, after a wait for the compiler. Like the device, it moves features by rounding
            alone, and is no part of a store's name.
        patience: Seconds to wait for another process that fills a store.
    """

    folder: Path
    extractor: Extractor
    views: ViewSettings
    batch_size: int = 32
    device: str | torch.device = "cpu"
    bf16: bool = False
    workers: int | None = None
    compiled: bool = False
    patience: float = 7200.0
    _weights: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_weights", state_checksum(self.extractor.backbone))

    def store(self, collection: ImageCollection, view: int | None = None) -> LocalFeatureStore:
        """The features of a collection, row by row; they are made first where they are missing.

        Args:
            collection: Which images.
            view: Number of an augmented view; ``None`` is the evaluation view.

        Returns:
            Nodes ``[n, N, C]`` in float16, and pooled global vectors ``[n, C]``.

        Raises:
            StoreLockedError: If another process still fills the store after ``patience``.
            ValueError: If the trunk gives features that are not finite, or beyond float16.
        """
        settings = self._settings(collection, view)
        text = json.dumps(settings, sort_keys=True)
        path = self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        if not _is_whole(path, len(collection)):
            with self._writer(path, settings) as writer:
                self._fill(writer, collection, view)
        return LocalFeatureStore.open(path)

    def _settings(self, collection: ImageCollection, view: int | None) -> dict[str, Any]:
        described = self.extractor.describe()
        described.pop("embedding_size")
        views = self.views
        if view is None:
            cut: dict[str, Any] = {"kind": "evaluation", "resize": views.resize, "crop": views.crop}
        else:
            cut = {
                "kind": "training",
                "number": view,
                "resize": views.resize,
                "crop": views.crop,
                "scale": views.scale,
                "ratio": views.ratio,
                "flip": views.flip,
            }
        settings = {
            "format": _FORMAT,
            **described,
            "weights": self._weights,
            "bf16": self.bf16,
            "view": cut,
            "images": contents_checksum(collection),
        }
        # As it comes back from JSON, so that tuples and lists do not differ.
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def _writer(self, path: Path, settings: dict[str, Any]) -> StoreWriter:
        deadline = time.monotonic() + self.patience
        told = False
        while True:
            try:
                return LocalFeatureStore.create(
                    path,
                    channels=self.extractor.backbone.channels,
                    nodes=node_count(self.extractor, self.views),
                    codec="float16",
                    global_channels=self.extractor.backbone.channels,
                    extractor=settings,
                )
            except StoreLockedError:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    _LOG.info("waiting for another process that caches the same features: %s", path)
                    told = True
                time.sleep(min(1.0, self.patience / 10))

    def _fill(self, writer: StoreWriter, collection: ImageCollection, view: int | None) -> None:
        done, total = len(writer), len(collection)
        if done == total:
            return
        extractor = self._inference
        device = torch.device(self.device)
        loader: DataLoader[Any] = DataLoader(
            _Views(collection, self._transform(view), done),
            batch_size=self.batch_size,
            num_workers=default_workers() if self.workers is None else self.workers,
            pin_memory=device.type == "cuda",
        )
        which = "evaluation view" if view is None else f"view {view + 1}"
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16),
            progress_counter(f"trunk features, {which}", total=total, unit="image") as bar,
        ):
            bar.update(done)
            for views, rows in loader:
                nodes, pooled = extractor.trunk(views.to(device, non_blocking=True))
                bad = ~torch.isfinite(nodes).flatten(1).all(dim=1).cpu()
                if bool(bad.any()):
                    names = [collection.image_name(row) for row in rows[bad].tolist()]
                    raise ValueError(
                        f"features: the backbone gave NaN or infinite features for "
                        f"{', '.join(names[:5])}; check its weights"
                    )
                writer.append(rows, nodes.float().cpu(), pooled.float().cpu())
                bar.update(len(rows))

    @cached_property
    def _inference(self) -> Extractor:
        """The extractor as features are made with it."""
        extractor = self.extractor.to(self.device).to(memory_format=torch.channels_last)
        extractor.eval()
        return compile_trunk(extractor) if self.compiled else extractor

    def _transform(self, view: int | None) -> Callable[[Any, int], Tensor]:
        cut = self.views
        if view is None:
            return _EvaluationView(
                self.extractor.evaluation_transform(resize=cut.resize, crop=cut.crop)
            )
        return _TrainingView(
            self.extractor.training_transform(
                resize=cut.resize, crop=cut.crop, scale=cut.scale, ratio=cut.ratio, flip=cut.flip
            ),
            view,
        )


class FeatureTable:
    """Cached features of several views, ready to be drawn from: in memory, or on disk where large.

    Args:
        stores: One a view, of the same images.
        kind: ``"nodes"``, their ``"mean"``, or the ``"pooled"`` vector.
        resident_bytes: Up to how many bytes are held in memory.
    """

    def __init__(
        self,
        stores: list[LocalFeatureStore],
        kind: str,
        *,
        resident_bytes: int = _RESIDENT_BYTES,
    ) -> None:
        self.stores = stores
        self.kind = kind
        self._resident: Tensor | None = None
        manifest = stores[0].manifest
        size = len(stores) * len(stores[0]) * int(manifest.nodes or 1) * manifest.channels * 2
        if kind != "nodes":
            parts = [self._vectors(store) for store in stores]
            self._resident = torch.stack(parts)
        elif size <= resident_bytes:
            self._resident = torch.stack([store.read_encoded().codes for store in stores])

    @property
    def num_views(self) -> int:
        """Views of each image."""
        return len(self.stores)

    def at(self, rows: Tensor, views: Tensor | None = None) -> Tensor:
        """Features of some images, each in the view that is asked for (the first by default).

        Shape:
            ``[b]`` and ``[b]`` to ``[b, N, C]`` or ``[b, C]``, float32.
        """
        views = torch.zeros_like(rows) if views is None else views
        if self._resident is not None:
            return self._resident[views, rows].float()
        manifest = self.stores[0].manifest
        features = torch.empty(len(rows), int(manifest.nodes or 1), manifest.channels)
        for view in views.unique().tolist():
            here = (views == view).nonzero().squeeze(1)
            features[here] = self.stores[view].nodes(rows[here])
        return features

    def _vectors(self, store: LocalFeatureStore) -> Tensor:
        if self.kind == "pooled":
            return store.global_vectors()
        rows = torch.arange(len(store))
        return torch.cat([store.nodes(part).mean(dim=1) for part in rows.split(512)])


def node_count(extractor: Extractor, views: ViewSettings) -> int:
    """N, the nodes of an image; where it depends on the image's size, that of the recipe counts."""
    if extractor.num_nodes is not None:
        return extractor.num_nodes
    device = next(extractor.parameters()).device
    modes = extractor.training
    extractor.eval()
    with torch.inference_mode():
        nodes, _ = extractor.trunk(torch.zeros(1, 3, views.crop, views.crop, device=device))
    extractor.train(modes)
    return int(nodes.shape[1])


def state_checksum(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def contents_checksum(collection: ImageCollection) -> str:
    """SHA-256 of what is in the images, in order: the bytes of files, or the pixels in memory."""
    # Losses, seeds and views ask for the same collection; reading it all takes seconds.
    if collection not in _CONTENTS:
        digest = hashlib.sha256()
        for image in collection.images:
            if isinstance(image, Path):
                with image.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(f"{image.shape}\n".encode())
                digest.update(np.ascontiguousarray(image).data)
        _CONTENTS[collection] = digest.hexdigest()
    return _CONTENTS[collection]


def _is_whole(path: Path, rows: int) -> bool:
    try:
        store = LocalFeatureStore.open(path)
    except FileNotFoundError:
        return False
    return store.manifest.complete and len(store) == rows


@dataclass(frozen=True)
class _EvaluationView:
    transform: Callable[[Any], Tensor]

    def __call__(self, image: Any, row: int) -> Tensor:
        return self.transform(image)


@dataclass(frozen=True)
class _TrainingView:
    transform: Callable[[Any, torch.Generator], Tensor]
    number: int

    def __call__(self, image: Any, row: int) -> Tensor:
        return self.transform(image, generator_of("cached view", self.number, row))


class _Views(Dataset[tuple[Tensor, int]]):
    """The images of a collection from some row on, each as a view."""

    def __init__(
        self, collection: ImageCollection, transform: Callable[[Any, int], Tensor], start: int
    ) -> None:
        self.collection = collection
        self.transform = transform
        self.start = start

    def __len__(self) -> int:
        return len(self.collection) - self.start

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        row = self.start + place
        return self.transform(self.collection.load(row), row), row
