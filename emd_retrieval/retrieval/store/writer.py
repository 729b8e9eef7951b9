"""Writing to a store: one writer at a time, behind what is there, seen from commit to commit."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_choice, check_finite, check_positive, check_tensor
from emd_retrieval.retrieval.store.codecs import CODECS, encode
from emd_retrieval.retrieval.store.lock import LOCK, WriterLock
from emd_retrieval.retrieval.store.manifest import (
    ID_KINDS,
    MANIFEST,
    SHARD_NAME,
    ShardRecord,
    StoreManifest,
    read_manifest,
    sync_folder,
    write_manifest,
)
from emd_retrieval.retrieval.store.shard import Ids, ShardWriter
from emd_retrieval.retrieval.store.store import (
    ABSENT,
    IdsLike,
    LocalFeatureStore,
    check_ids,
)

Nodes = Tensor | NDArray[Any] | Sequence[Tensor] | Sequence[NDArray[Any]]

_COMMIT_BYTES = 64 * 2**20
# The ids appended since the last index, which live in memory: between these bounds as many as are
# indexed, so that all sorting together costs a few times the last.
_FRESH_IDS = (2**16, 2**20)


class StoreWriter:
    """The one writer of a store: :meth:`append`, :meth:`commit`, :meth:`close`.

    As a context manager it closes at the end; after an exception it commits what was appended
    whole, and the store stays marked as incomplete. A killed writer loses what it had appended
    since its last commit (64 MiB at most), no more.

    Build it with :meth:`LocalFeatureStore.create` or :meth:`LocalFeatureStore.append_to`.

    Attributes:
        path: The store's folder.
        manifest: What is committed.
    """

    def __init__(self, path: Path, lock: WriterLock | None = None) -> None:
        self.path = path
        if lock is None:
            read_manifest(path)  # no lock file where there is no store
            lock = WriterLock(path)
        self._lock = lock
        self._open = True
        self._shard: ShardWriter | None = None
        try:
            self._view = LocalFeatureStore(path)
            self.manifest = self._view.manifest
            self._sweep()
            self._sealed = list(self.manifest.shards)
            last = self._sealed[-1] if self._sealed else None
            # A shard of another process's part is closed for good.
            if last is not None and last.rows < self.manifest.shard_rows and "/" not in last.path:
                self._shard = ShardWriter(path, self._sealed.pop(), self.manifest)
        except BaseException:
            self._release()
            raise
        self._fresh: set[int | str] = set()
        self._pending = 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._open:
            try:
                self.commit()
            finally:
                self._release()

    def __len__(self) -> int:
        """Sets in the store, those not committed yet included."""
        written = sum(shard.rows for shard in self._sealed)
        return written + (self._shard.rows if self._shard else 0) - self.manifest.deleted

    def contains(self, ids: IdsLike) -> Tensor:
        """Which ids are stored already, or appended and not committed yet. Shape: ``[n]``, bool."""
        known = check_ids("ids", ids, self.manifest.ids)
        stored = self._view.contains(known)
        values = known.tolist() if isinstance(known, np.ndarray) else known
        return stored | torch.tensor([value in self._fresh for value in values], dtype=torch.bool)

    def append(
        self,
        ids: IdsLike,
        nodes: Nodes,
        global_vectors: Tensor | NDArray[Any] | None = None,
    ) -> None:
        """Write sets behind the others. Readers see them after the next commit.

        Args:
            ids: One a set; none may be in the store already.
            nodes: Shape: ``[n, N, D]``, or n of ``[N_i, D]`` where N varies.
            global_vectors: Shape: ``[n, G]``; where the store has them, and only there.

        Raises:
            TypeError: If ids or arrays are of the wrong type.
            ValueError: If an id is there already, shapes do not fit, or a value is not finite or
                beyond the codec. Nothing is written then.
            OSError: If the disk is full, for instance. What was committed stays whole, and the
                writer is closed.
        """
        if not self._open:
            raise ValueError("store: the writer is closed")
        wanted = check_ids("ids", ids, self.manifest.ids)
        sets = self._check_nodes(nodes)
        if len(sets) != len(wanted):
            raise ValueError(f"ids: expected one a set ({len(sets)}), got {len(wanted)}")
        vectors = self._check_global_vectors(global_vectors, len(sets))
        self._check_new(wanted)
        if not sets:
            return
        whole = encode(np.concatenate(sets), self.manifest.codec)
        ends = np.cumsum([len(part) for part in sets])[:-1]
        encoded = np.split(whole, ends)
        try:
            self._write(wanted, encoded, vectors)
        except BaseException:
            self._give_up()
            raise

    def commit(self) -> None:
        """Make all that was appended visible and safe.

        Raises:
            OSError: If that fails; what was committed before stays whole, and the writer is closed.
        """
        if self._pending or self.manifest.shards != tuple(self._records()):
            self._commit(complete=False)

    def close(self) -> None:
        """Commit, sort the ids, and let the next writer in; again is harmless."""
        if not self._open:
            return
        try:
            if self._shard is not None:
                self._index()
            if not self.manifest.complete or self.manifest.shards != tuple(self._records()):
                self._commit(complete=True)
        finally:
            self._release()

    def _check_nodes(self, nodes: Nodes) -> list[NDArray[np.float32]]:
        channels, fixed = self.manifest.channels, self.manifest.nodes
        if isinstance(nodes, Tensor | np.ndarray):
            tensor = _tensor("nodes", nodes)
            check_tensor(
                "nodes", tensor, ["n", "N" if fixed is None else fixed, channels], finite=True
            )
            if tensor.shape[1] == 0:
                raise ValueError("nodes: expected at least one node a set, got none")
            return list(_float32(tensor))
        sets = []
        for i, part in enumerate(nodes):
            tensor = _tensor(f"nodes[{i}]", part)
            check_tensor(f"nodes[{i}]", tensor, ["N" if fixed is None else fixed, channels])
            if not len(tensor):
                raise ValueError(f"nodes[{i}]: expected at least one node, got none")
            check_finite(f"nodes[{i}]", tensor)
            sets.append(_float32(tensor))
        return sets

    def _check_global_vectors(
        self, vectors: Tensor | NDArray[Any] | None, count: int
    ) -> NDArray[np.float32] | None:
        channels = self.manifest.global_channels
        if (vectors is None) != (channels is None):
            raise ValueError(
                "global_vectors: the store has none, got some"
                if channels is None
                else f"global_vectors: expected shape [{count}, {channels}], got none"
            )
        if vectors is None:
            return None
        tensor = _tensor("global_vectors", vectors)
        check_tensor("global_vectors", tensor, [count, int(channels or 0)], finite=True)
        return _float32(tensor)

    def _check_new(self, ids: Ids) -> None:
        values: list[Any] = ids.tolist() if isinstance(ids, np.ndarray) else ids
        if ABSENT in values:
            raise ValueError(
                f"ids: expected none to be {ABSENT}, which stands for no candidate (as in FAISS), "
                f"got it at {values.index(ABSENT)}"
            )
        if len(set(values)) < len(values):
            twice = next(value for value, count in Counter(values).items() if count > 1)
            raise ValueError(f"ids: expected each id once, got {twice!r} twice")
        stored = self.contains(ids).nonzero().flatten().tolist()
        if stored:
            shown = ", ".join(repr(values[i]) for i in stored[:5])
            raise ValueError(
                f"ids: {len(stored)} of {len(values)} are in the store already: {shown}"
                f"{', ...' if len(stored) > 5 else ''}"
            )

    def _write(
        self, ids: Ids, sets: Sequence[NDArray[np.uint8]], vectors: NDArray[np.float32] | None
    ) -> None:
        done = 0
        while done < len(sets):
            if self._shard is None:
                path = f"shard-{self._next_number():06d}"
                self._shard = ShardWriter(self.path, ShardRecord(path, 0, 0, 0, {}), self.manifest)
                sync_folder(self.path)
            end = min(len(sets), done + self.manifest.shard_rows - self._shard.rows)
            part = ids[done:end]
            self._shard.append(part, sets[done:end], None if vectors is None else vectors[done:end])
            self._fresh.update(part.tolist() if isinstance(part, np.ndarray) else part)
            self._pending += sum(one.nbytes for one in sets[done:end])
            done = end
            if self._shard.rows == self.manifest.shard_rows:
                self._index()
                self._commit(complete=False)
                self._sealed.append(self._shard.record())
                self._shard.close()
                self._shard = None
            elif len(self._fresh) > np.clip(self._shard.indexed, *_FRESH_IDS):
                self._index()
                self._commit(complete=False)
        if self._pending >= _COMMIT_BYTES:
            self._commit(complete=False)

    def _next_number(self) -> int:
        own = [shard.path for shard in self._sealed if "/" not in shard.path]
        return max((int(path.rpartition("-")[2]) + 1 for path in own), default=0)

    def _records(self) -> list[ShardRecord]:
        current = [self._shard.record()] if self._shard is not None and self._shard.rows else []
        return [*self._sealed, *current]

    def _index(self) -> None:
        if self._shard is not None:
            try:
                self._shard.build_index()
            except BaseException:
                self._give_up()
                raise

    def _commit(self, *, complete: bool) -> None:
        manifest = replace(self.manifest, shards=tuple(self._records()), complete=complete)
        try:
            if self._shard is not None:
                self._shard.sync()
            write_manifest(self.path, manifest)
        except BaseException:
            self._give_up()
            raise
        self.manifest = manifest
        self._pending = 0
        if self._shard is not None:
            self._shard.committed()
            if self._shard.indexed == self._shard.rows:
                self._view.refresh()
                self._fresh.clear()

    def _give_up(self) -> None:
        """After a failed write: files back to what is committed, and no more writing."""
        try:
            if self._shard is not None:
                # The failure, or Ctrl-C, may have come when the manifest was replaced already: what
                # it names now must stay.
                with suppress(OSError, ValueError):
                    named = {shard.path: shard for shard in read_manifest(self.path).shards}
                    self._shard.roll_back(named.get(self._shard.path))
        finally:
            self._release()

    def _release(self) -> None:
        if not self._open:
            return
        self._open = False
        if self._shard is not None:
            self._shard.close()
        self._lock.release()

    def _sweep(self) -> None:
        """Take away what a killed writer left and no manifest names."""
        named = {shard.path for shard in self.manifest.shards}
        for place in self.path.glob("shard-*"):
            stray = SHARD_NAME.fullmatch(place.name) and place.name not in named
            if stray and place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
        for shard in self.manifest.shards:
            for file in (self.path / shard.path).glob("index-*.bin"):
                if file.name not in shard.files:
                    file.unlink()
        for file in self.path.glob("deleted-*.bin"):
            if not self.manifest.deleted or file.name != self.manifest.deleted_name:
                file.unlink()


def create_store(path: Path, **settings: Any) -> StoreWriter:
    """See :meth:`LocalFeatureStore.create`."""
    manifest = check_settings(**settings)
    path.mkdir(parents=True, exist_ok=True)
    others = sorted(item.name for item in path.iterdir() if item.name not in (LOCK, MANIFEST))
    fresh = not (path / MANIFEST).exists()
    if fresh and [name for name in others if name != f"{MANIFEST}.partial"]:
        raise FileExistsError(f"store: {path} exists and is no store; it holds {others[0]!r}")
    lock = WriterLock(path)
    try:
        if (path / MANIFEST).exists():
            check_same(path, read_manifest(path), manifest)
        else:
            write_manifest(path, manifest)
    except BaseException:
        lock.release()
        raise
    return StoreWriter(path, lock)


def check_settings(
    *,
    channels: int,
    nodes: int | None,
    codec: str,
    global_channels: int | None,
    ids: str,
    extractor: Mapping[str, Any],
    shard_rows: int,
) -> StoreManifest:
    """An empty manifest of these settings.

    Raises:
        ValueError: If a setting is not valid.
        TypeError: If the extractor's settings are not plain JSON values.
    """
    counts = {"channels": channels, "nodes": nodes, "global_channels": global_channels}
    for name, value in {**counts, "shard_rows": shard_rows}.items():
        if value is None and name in ("nodes", "global_channels"):
            continue
        check_positive(name, value)  # type: ignore[arg-type]
        if int(value) != value:  # type: ignore[arg-type]
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if shard_rows > 2**31:
        raise ValueError(f"shard_rows: expected at most 2**31, got {shard_rows}")
    check_choice("codec", codec, CODECS)
    check_choice("ids", ids, ID_KINDS)
    try:
        plain = json.loads(json.dumps(dict(extractor), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"extractor: expected plain JSON values ({error})") from error
    return StoreManifest(
        channels=channels,
        nodes=nodes,
        codec=codec,
        global_channels=global_channels,
        ids=ids,
        extractor=plain,
        shard_rows=shard_rows,
    )


def check_same(path: Path, there: StoreManifest, wanted: StoreManifest) -> None:
    """Raise ``ValueError`` naming the first setting in which two stores differ."""
    old, new = (
        {
            **{name: value for name, value in side.items() if name != "extractor"},
            **{f"extractor {name}": value for name, value in side["extractor"].items()},
        }
        for side in (there.settings(), wanted.settings())
    )
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{name}: the store {path.name} was written with {old.get(name)!r}, got "
                f"{new.get(name)!r}; use the same settings, or another store"
            )


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            raise TypeError(f"{name}: expected floating-point numbers, got {value.dtype}")
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(value).__name__}")
    return value


def _float32(value: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = value.detach().cpu().float().contiguous().numpy()
    return array
