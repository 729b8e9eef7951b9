"""A store written by several processes: each fills a part, and one manifest joins them.

A part is a store of its own inside the store's folder until the last process is done; then its
shards become the store's, where they lie. The processes need nothing but the shared folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from emd_retrieval.retrieval.store.lock import LOCK, StoreLockedError, WriterLock
from emd_retrieval.retrieval.store.manifest import (
    MANIFEST,
    StoreManifest,
    read_manifest,
    write_manifest,
)
from emd_retrieval.retrieval.store.shard import id_text
from emd_retrieval.retrieval.store.store import LocalFeatureStore
from emd_retrieval.retrieval.store.writer import StoreWriter, check_same

_PART = re.compile(r"part-(\d{5})-of-(\d{5})")
# The lock over the whole is held for moments only: to look, and to join.
_PATIENCE = 60.0


def part_path(path: Path, part: int, parts: int) -> Path:
    """The folder of one part."""
    return path / f"part-{part:05d}-of-{parts:05d}"


def parts_started(path: Path) -> int | None:
    """How many parts a store that is not joined yet was started with; ``None`` without parts."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return None
    names = (_PART.fullmatch(place.name) for place in sorted(path.iterdir()))
    return next((int(name[2]) for name in names if name), None)


def create_part(path: str | Path, part: int, parts: int, **settings: Any) -> StoreWriter | None:
    """Create one part of a store, or continue it.

    Args:
        path: The store's folder, shared by all.
        part: Which part, from 0.
        parts: How many there are.
        settings: As of :meth:`LocalFeatureStore.create`.

    Returns:
        The part's writer; ``None`` if the store is joined already.

    Raises:
        ValueError: If the store was started with another number of parts, or other settings.
        StoreLockedError: If another writer has the part.
    """
    path = Path(path)
    if not 0 <= part < parts <= 99_999:
        raise ValueError(f"part: expected 0 to {parts - 1} of {parts}, got {part}")
    path.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(path, patience=_PATIENCE)
    try:
        if (path / MANIFEST).exists():
            _retire([part_path(path, one, parts) for one in range(parts)])
            return None
        started = parts_started(path)
        if started not in (None, parts):
            raise ValueError(
                f"parts: the store {path.name} was started by {started} processes, got {parts}; "
                f"go on with {started}, or use another store"
            )
        return LocalFeatureStore.create(part_path(path, part, parts), **settings)
    finally:
        lock.release()


def join_parts(
    path: str | Path, parts: int, *, before: Callable[[list[Path]], None] | None = None
) -> bool:
    """Join the parts of a store under one manifest, if all of them are complete.

    Every process calls this when it has closed its part; the last one finds all complete.

    Args:
        path: The store's folder.
        parts: How many there are.
        before: Called with the parts' folders just before the store comes into being.

    Returns:
        Whether the store is there now.

    Raises:
        ValueError: If parts differ in their settings, or share ids.
        StoreDamagedError: If a part is damaged.
    """
    path = Path(path)
    folders = [part_path(path, part, parts) for part in range(parts)]
    with ExitStack() as locks:
        locks.callback(WriterLock(path, patience=_PATIENCE).release)
        if (path / MANIFEST).exists():
            return True
        if not all((folder / MANIFEST).exists() for folder in folders):
            return False
        try:
            for folder in folders:
                locks.callback(WriterLock(folder).release)
        except StoreLockedError:
            return False  # whoever writes there will call when done
        manifests = {folder: read_manifest(folder) for folder in folders}
        if not all(manifest.complete for manifest in manifests.values()):
            return False
        whole = _joined(manifests)
        _check_distinct(folders)
        if before is not None:
            before(folders)
        write_manifest(path, whole)
        _retire(folders)
    return True


def _retire(folders: list[Path]) -> None:
    """From now on the whole store's manifest tells of the parts' shards, and no other."""
    for folder in folders:
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)


def _joined(manifests: Mapping[Path, StoreManifest]) -> StoreManifest:
    first = next(iter(manifests.values()))
    shards = []
    for folder, manifest in manifests.items():
        check_same(folder, manifest, first)
        if manifest.deleted:
            raise ValueError(f"parts: {folder.name} has deleted sets; delete after the joining")
        shards += [replace(shard, path=f"{folder.name}/{shard.path}") for shard in manifest.shards]
    return replace(first, shards=tuple(shards), complete=True)


def _check_distinct(folders: list[Path]) -> None:
    """Raise if two parts have an id in common."""
    stores = [LocalFeatureStore(folder) for folder in folders]
    for number, store in enumerate(stores):
        for other in stores[number + 1 :]:
            ids = other.ids
            shared = store.contains(ids).nonzero().flatten().tolist()
            if shared:
                raise ValueError(
                    f"parts: {store.path.name} and {other.path.name} share {len(shared)} ids, "
                    f"the first is {id_text(ids[shared[0]])}"
                )
