"""``extract``: images to a local-feature store, resumable, by one process or many.

A killed run loses a second of work or so: run it again with the same settings, and the images that
are stored already are passed over.
"""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from emd_retrieval._files import check_folder
from emd_retrieval.datasets import UnreadableImageError
from emd_retrieval.features import Extractor
from emd_retrieval.progress import progress_counter
from emd_retrieval.retrieval import LocalFeatureStore, StoreWriter
from emd_retrieval.retrieval.store import create_part, join_parts, parts_started
from emd_retrieval.training.model import WEIGHTS_FILE
from emd_retrieval.workflows.images import ImageList, ImageViews, collate_views, read_image_list
from emd_retrieval.workflows.models import FeatureSettings

SKIPPED = "skipped.csv"
_PARTIAL = f"{SKIPPED}.partial"
_COMMIT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class ExtractImages(FeatureSettings):
    """Settings of :func:`extract_images`; those of features as in :class:`FeatureSettings`.

    Attributes:
        images: A folder, searched at any depth; a text file with a path a line; or a table
            (.parquet, .csv) with a column ``path`` and optionally ``id``. Paths in files are
            relative to the file's folder.
        store: The store's folder.
        codec: How nodes are stored: ``"float32"``, ``"float16"`` or ``"int8"``.
        global_vectors: Store the pooled vectors as well.
        batch_size: Images a forward pass.
        bf16: Run the backbone in bfloat16.
        num_workers: Processes that decode images.
        skip_errors: Leave unreadable images out and list them in the store's ``skipped.csv``.
        part: Which part of the images is this process's, from 0.
        parts: How many processes share the images.
    """

    images: Path
    store: Path
    codec: str = "float16"
    global_vectors: bool = True
    batch_size: int = 32
    bf16: bool = False
    num_workers: int = 0
    skip_errors: bool = False
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class ExtractedStore:
    """What a run of :func:`extract_images` did.

    Attributes:
        path: The store's folder.
        images: Images of this process's part.
        stored: How many of them this run stored.
        there: How many were stored before.
        skipped: Id of each unreadable image that was left out, and why.
        joined: The store is whole. ``False`` while other processes work on their parts.
    """

    path: Path
    images: int
    stored: int
    there: int
    skipped: dict[str, str]
    joined: bool


def extract_images(settings: ExtractImages) -> ExtractedStore:
    """Extract the local features of images into a store; what is stored already is passed over.

    With ``parts`` above 1 every process stores its run of the images, in any order and at any time;
    the last to finish joins the parts.

    Args:
        settings: What to extract, and how.

    Raises:
        FileNotFoundError: If images or weights are missing, or a folder has no image.
        UnreadableImageError: If an image cannot be decoded and ``skip_errors`` is not set; what was
            stored before it stays.
        ValueError: If ids are not unique, or settings do not fit each other or the store that is
            there.
        StoreLockedError: If another writer has the store.
    """
    if not 0 <= settings.part < settings.parts:
        raise ValueError(
            f"shard: expected 0 to {settings.parts - 1} of {settings.parts}, got {settings.part}"
        )
    check_folder(settings.store, "store")
    everything = read_image_list(settings.images)
    mine = everything.part(settings.part, settings.parts)
    if settings.parts == 1:
        started = parts_started(settings.store)
        if started is not None:
            raise ValueError(
                f"store: {settings.store} was started by {started} processes; go on with "
                f"{started} (torchrun, or --shard 0/{started} and so on), or use another store"
            )
    extraction = load_extraction(settings)
    extractor = extraction.extractor
    shape: dict[str, Any] = {
        "channels": extractor.channels,
        "nodes": _num_nodes(extraction),
        "codec": settings.codec,
        "global_channels": extractor.channels if settings.global_vectors else None,
        "ids": "int64" if isinstance(everything.ids, np.ndarray) else "string",
        "extractor": extraction.described,
    }
    writer: StoreWriter | None
    if settings.parts == 1:
        writer = LocalFeatureStore.create(settings.store, **shape)
    else:
        writer = create_part(settings.store, settings.part, settings.parts, **shape)
    if writer is None:
        return _joined_before(settings, mine)
    with writer:
        run = _Run(settings, mine, extraction, writer)
        stored = run.store_all()
    joined = settings.parts == 1 or join_parts(
        settings.store, settings.parts, before=lambda parts: _join_skipped(settings.store, parts)
    )
    skipped = {name: reason for name, (_, reason) in run.skipped.items()}
    return ExtractedStore(settings.store, len(mine), stored, run.there, skipped, joined)


@dataclass(frozen=True)
class Extraction:
    """An extractor, ready, with what it does to an image.

    Attributes:
        extractor: In evaluation mode.
        transform: Views of a PIL image.
        crop: Side of the centre crop, in pixels.
        described: All that decides the features, as plain values, for a store's manifest.
    """

    extractor: Extractor
    transform: Callable[[Any], Tensor]
    crop: int
    described: Mapping[str, Any]


def load_extraction(settings: ExtractImages) -> Extraction:
    """The extractor of the settings, or of the trained run that they name.

    Raises:
        FileNotFoundError: If weights or the run are missing.
        ValueError: If the backbone, the weights or the run cannot be used.
    """
    source: dict[str, Any] = {"weights": "timm's hub"}
    if settings.weights is not None:
        if not settings.weights.is_file():
            raise FileNotFoundError(f"weights: no file {str(settings.weights)!r}")
        source = {"weights": settings.weights.name, "weights_sha256": _sha256(settings.weights)}
    model = settings.load()
    extractor = model.extractor
    if settings.model is not None:
        source |= {
            "model": settings.model.resolve().name,
            "model_sha256": _sha256(settings.model / WEIGHTS_FILE),
            "matching": model.matcher.describe(),
        }
    return Extraction(
        extractor,
        extractor.evaluation_transform(resize=model.resize, crop=model.crop, seed=settings.seed),
        model.crop,
        {
            **extractor.describe(),
            **source,
            "resize": model.resize,
            "crop": model.crop,
            "bf16": settings.bf16,
            "seed": settings.seed,
        },
    )


class _Run:
    """One process's images on their way into its store."""

    def __init__(
        self,
        settings: ExtractImages,
        images: ImageList,
        extraction: Extraction,
        writer: StoreWriter,
    ) -> None:
        self.settings = settings
        self.images = images
        self.extractor = extraction.extractor.to(settings.device)
        self.transform = extraction.transform
        self.writer = writer
        stored = writer.contains(images.ids).numpy()
        self.there = int(stored.sum())
        (writer.path / _PARTIAL).unlink(missing_ok=True)
        # What a killed run noted of batches that it did not store is found out again.
        self.skipped = {
            name: (row, reason)
            for name, (row, reason) in read_skipped(writer.path).items()
            if settings.skip_errors and row < len(writer)
        }
        # A killed run goes on behind the images that it found unreadable; a new run tries them
        # again, after the others, so that batches stay what they were.
        failed = np.array([str(name) in self.skipped for name in images.ids], dtype=bool) & ~stored
        todo = [np.flatnonzero(~stored & ~failed)]
        if writer.manifest.complete:
            todo.append(np.flatnonzero(failed))
        self.batches = [
            part[start : start + settings.batch_size].tolist()
            for part in todo
            for start in range(0, len(part), settings.batch_size)
        ]

    def store_all(self) -> int:
        """Extract and store what is missing; returns how many images."""
        stored, committed = 0, time.monotonic()
        loader: DataLoader[Any] = DataLoader(
            ImageViews(self.images, self.transform),
            batch_sampler=self.batches,
            num_workers=self.settings.num_workers,
            collate_fn=collate_views,
            pin_memory=torch.device(self.settings.device).type == "cuda",
        )
        shown = "extracting" if self.settings.part == 0 else None
        with progress_counter(shown, total=len(self.images), unit="image") as bar:
            bar.update(len(self.images) - sum(map(len, self.batches)))
            for rows, views, failures in loader:
                self._note(rows, failures)
                if rows:
                    self._store(rows, views)
                stored += len(rows)
                bar.update(len(rows) + len(failures))
                if time.monotonic() - committed >= _COMMIT_SECONDS:
                    self.writer.commit()
                    committed = time.monotonic()
        return stored

    def _store(self, rows: list[int], views: Tensor) -> None:
        device = torch.device(self.settings.device)
        views = views.to(device, non_blocking=True)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.settings.bf16),
        ):
            nodes, pooled = self.extractor.with_global(views)
        nodes, pooled = nodes.float().cpu(), pooled.float().cpu()
        finite = torch.isfinite(nodes).flatten(1).all(dim=1) & torch.isfinite(pooled).all(dim=1)
        if not bool(finite.all()):
            bad = self.images.ids[rows[int((~finite).nonzero()[0])]]
            raise ValueError(
                f"features: the backbone gave NaN or infinite features for "
                f"{int((~finite).sum())} image(s) of a batch, the first is {bad!r}. Check the "
                "weights, or run without bf16"
            )
        ids = self.images.ids
        self.writer.append(
            ids[rows] if isinstance(ids, np.ndarray) else [ids[row] for row in rows],
            nodes,
            pooled if self.settings.global_vectors else None,
        )

    def _note(self, rows: list[int], failures: list[tuple[int, str]]) -> None:
        """Keep the list of unreadable images in step with the store."""
        before = dict(self.skipped)
        for row in rows:
            self.skipped.pop(str(self.images.ids[row]), None)
        for row, reason in failures:
            if not self.settings.skip_errors:
                # What is done is safe before the run ends.
                self.writer.commit()
                raise UnreadableImageError(
                    f"{self.images.paths[row]}: {reason}. Restore or remove the image, or set "
                    "skip_errors (--skip-errors) to go on without unreadable ones; "
                    f"{len(self.writer)} images are stored already"
                )
            name = str(self.images.ids[row])
            self.skipped[name] = self.skipped.get(name, (len(self.writer),))[0], reason
        if self.skipped != before:
            write_skipped(self.writer.path, self.skipped)


def read_skipped(store: Path) -> dict[str, tuple[int, str]]:
    """Ids of images that were left out: how many were stored before their batch, and why."""
    path = store / SKIPPED
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            return {row["id"]: (int(row["row"]), row["reason"]) for row in csv.DictReader(file)}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(
                f"store: {path} was altered and cannot be read ({error}); remove it, and what it "
                "listed is tried again"
            ) from error


def write_skipped(store: Path, skipped: Mapping[str, tuple[int, str]]) -> None:
    """Write the list of images that were left out; an empty one is no file."""
    path = store / SKIPPED
    if not skipped:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("id", "row", "reason"))
    table.writerows((name, row, reason) for name, (row, reason) in skipped.items())
    # Always the same temporary name, so that a killed run leaves none behind.
    partial = path.with_name(_PARTIAL)
    # Names of files that are no UTF-8 keep their bytes.
    partial.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape", newline="")
    partial.replace(path)


def _join_skipped(store: Path, parts: list[Path]) -> None:
    write_skipped(store, {k: v for part in parts for k, v in read_skipped(part).items()})


def _joined_before(settings: ExtractImages, images: ImageList) -> ExtractedStore:
    """A shared run repeated after its end: there must be nothing left to do."""
    store = LocalFeatureStore(settings.store)
    skipped = read_skipped(settings.store)
    stored = store.contains(images.ids).numpy()
    missing = [
        name
        for name, there in zip(images.ids, stored, strict=True)
        if not there and str(name) not in skipped
    ]
    if missing:
        raise ValueError(
            f"store: {settings.store} is finished and lacks {len(missing)} of these images, the "
            f"first is {missing[0]!r}; one process without shards can add them"
        )
    mine = {str(name) for name in images.ids}
    return ExtractedStore(
        settings.store,
        len(images),
        0,
        int(stored.sum()),
        {name: reason for name, (_, reason) in skipped.items() if name in mine},
        joined=True,
    )


def _num_nodes(extraction: Extraction) -> int:
    """N, tried out where it depends on the size of the images."""
    extractor, crop = extraction.extractor, extraction.crop
    if extractor.num_nodes is not None:
        return extractor.num_nodes
    with torch.inference_mode():
        return int(extractor(torch.zeros(1, 3, crop, crop)).shape[1])


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
