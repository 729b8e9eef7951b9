"""The local-feature store: sets of local features by id, on disk, in one folder.

Opening reads one small file; reading touches the rows that were asked for. Writing is
:class:`StoreWriter`'s.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval.retrieval.store.codecs import EncodedSets, node_bytes, split, to_tensors
from emd_retrieval.retrieval.store.lock import WriterLock
from emd_retrieval.retrieval.store.manifest import (
    SHARD_ROWS,
    FileRecord,
    StoreDamagedError,
    StoreManifest,
    inside,
    read_manifest,
    write_manifest,
)
from emd_retrieval.retrieval.store.shard import (
    Ids,
    Rows,
    ShardReader,
    crc32_of,
    id_keys,
    id_text,
    write_synced,
)

if TYPE_CHECKING:
    from emd_retrieval.retrieval.store.writer import StoreWriter

RowsLike = Tensor | NDArray[Any] | Sequence[int]
IdsLike = Tensor | NDArray[Any] | Sequence[int] | Sequence[str]

ABSENT = -1
"""The id, and the row, of a place for which a first stage found nothing (FAISS's convention)."""

_SHOWN = 5


@dataclass(frozen=True)
class SetPlaces:
    """Where sets of one size lie in open files, for those who read in their own loop.

    Attributes:
        files: A descriptor a set, open as long as this object lives. Shape: ``[n]``, int64.
        offsets: Where in its file each set starts, in bytes. Shape: ``[n]``, int64.
    """

    files: NDArray[np.int64]
    offsets: NDArray[np.int64]
    _keeps_open: Any = field(repr=False)


class LocalFeatureStore:
    """A read-only view of a store, as it was when it was opened.

    Positions go from 0 to ``len(store) - 1`` in the order of appending; deleted sets have none.
    Appends and deletions by others leave an open view as it is (see :meth:`refresh`). Each set is
    held against its checksum when it is first read.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "birds.store"
        >>> with LocalFeatureStore.create(path, channels=8, nodes=5, ids="string") as writer:
        ...     writer.append(["wren", "robin"], torch.randn(2, 5, 8))
        >>> store = LocalFeatureStore.open(path)
        >>> store.rows_of(["robin"])
        tensor([1])
        >>> store.nodes([1]).shape
        torch.Size([1, 5, 8])

    Attributes:
        path: The store's folder.
        manifest: Settings, shards and checksums.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.refresh()

    @staticmethod
    def open(path: str | Path, *, verify: bool = False) -> LocalFeatureStore:
        """Open a store for reading.

        Args:
            path: The store's folder.
            verify: Read every file and hold it against its checksum, as :meth:`verify` does.

        Raises:
            FileNotFoundError: If there is no store.
            ValueError: If it is of another version.
            StoreDamagedError: If a file is missing, truncated or altered.
        """
        store = LocalFeatureStore(path)
        if verify:
            store.verify()
        return store

    @staticmethod
    def create(
        path: str | Path,
        *,
        channels: int,
        nodes: int | None,
        codec: str = "float16",
        global_channels: int | None = None,
        ids: str = "int64",
        extractor: Mapping[str, Any] | None = None,
        shard_rows: int = SHARD_ROWS,
    ) -> StoreWriter:
        """Create a store and open it for writing; one of the same settings is continued.

        Args:
            path: A folder that does not exist yet, is empty, or holds a store of these settings.
            channels: D, the channels of a node.
            nodes: N, the nodes of a set; ``None`` where it varies from set to set.
            codec: ``"float32"``, ``"float16"`` or ``"int8"`` (with a scale a node).
            global_channels: Channels of the global vectors; ``None`` stores none.
            ids: ``"int64"`` or ``"string"``.
            extractor: Where the features come from, as plain JSON values; who reads the store can
                hold it against the queries' extractor.
            shard_rows: Sets a shard.

        Raises:
            FileExistsError: If the folder holds something else.
            ValueError: If a setting is not valid, or the store that is there has others.
            StoreLockedError: If another writer has the store.
        """
        from emd_retrieval.retrieval.store.writer import create_store

        return create_store(
            Path(path),
            channels=channels,
            nodes=nodes,
            codec=codec,
            global_channels=global_channels,
            ids=ids,
            extractor=extractor or {},
            shard_rows=shard_rows,
        )

    @staticmethod
    def append_to(path: str | Path) -> StoreWriter:
        """Open a store for writing behind what it has.

        Raises:
            FileNotFoundError: If there is no store.
            StoreDamagedError: If a file is missing, truncated or altered.
            StoreLockedError: If another writer has the store.
        """
        from emd_retrieval.retrieval.store.writer import StoreWriter

        return StoreWriter(Path(path))

    def refresh(self) -> None:
        """See what was committed or deleted since the store was opened."""
        while True:
            manifest = read_manifest(self.path)
            try:
                shards = [ShardReader(self.path, s, manifest) for s in manifest.shards]
                dead = _read_deleted(self.path, manifest)
            except FileNotFoundError as error:
                # A writer that commits in between takes the old index away.
                if read_manifest(self.path) == manifest:
                    raise StoreDamagedError(f"store: {error.filename} is missing") from error
            else:
                break
        self.manifest = manifest
        self._shards = shards
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._dead = dead
        # The deleted rows in front of a position are those whose gap is not behind it.
        self._gaps = dead - np.arange(len(dead))

    def __len__(self) -> int:
        return self.manifest.rows - self.manifest.deleted

    def __repr__(self) -> str:
        m = self.manifest
        nodes = "varying" if m.nodes is None else m.nodes
        shape = f"{len(self)} x {nodes} x {m.channels}"
        return f"LocalFeatureStore({str(self.path)!r}, {shape}, {m.codec})"

    def __reduce__(self) -> tuple[type[LocalFeatureStore], tuple[Path]]:
        """Another process opens the store anew instead of taking its bytes along."""
        return LocalFeatureStore, (self.path,)

    @property
    def ids(self) -> Ids:
        """All ids, by position: an int64 array, or a list of strings."""
        return self.ids_at(np.arange(len(self)))

    def ids_at(self, rows: RowsLike) -> Ids:
        """Ids at some positions: an int64 array, or a list of strings.

        Raises:
            ValueError: If a position is out of range.
        """
        parts = [
            (at, shard.ids(local)) for shard, at, local in self._by_shard(self._physical(rows))
        ]
        if self.manifest.ids == "int64":
            numbers = np.empty(sum(len(at) for at, _ in parts), np.int64)
            for at, found in parts:
                numbers[at] = found
            return numbers
        texts = [""] * sum(len(at) for at, _ in parts)
        for at, found in parts:
            for place, text in zip(at.tolist(), found, strict=True):
                texts[place] = text
        return texts

    def rows_of(self, ids: IdsLike) -> Tensor:
        """Positions of some ids. Shape: ``[n]``, int64.

        Raises:
            TypeError: If the store's ids are of the other kind.
            ValueError: If ids are not in the store; the first ones are named.
            StoreDamagedError: If ids are not found because a file was altered.
        """
        wanted = check_ids("ids", ids, self.manifest.ids)
        found = self._find(wanted)
        if len(found) and found.min() < 0:
            missing = np.flatnonzero(found < 0)
            problems = [text for s in self._shards for text in s.problems(s.id_files())]
            if problems:
                raise StoreDamagedError(f"store: {'; '.join(problems)}")
            shown = ", ".join(id_text(wanted[i]) for i in missing[:_SHOWN].tolist())
            more = ", ..." if len(missing) > _SHOWN else ""
            raise ValueError(
                f"ids: {len(missing)} of {len(wanted)} are not in the store {self.path.name} "
                f"({len(self)} sets): {shown}{more}"
            )
        if len(self._dead):
            found = found - self._dead.searchsorted(found)
        return torch.from_numpy(found)

    def contains(self, ids: IdsLike) -> Tensor:
        """Which ids are in the store. Shape: ``[n]``, bool.

        Raises:
            TypeError: If the store's ids are of the other kind.
        """
        return torch.from_numpy(self._find(check_ids("ids", ids, self.manifest.ids)) >= 0)

    def counts(self, rows: RowsLike | None = None) -> Tensor:
        """Nodes of some sets; all by default. Shape: ``[n]``, int64.

        Raises:
            ValueError: If a position is out of range.
        """
        return torch.from_numpy(self._counts(self._physical(rows)))

    def read_encoded(self, rows: RowsLike | None = None) -> EncodedSets:
        """Some sets as they are stored, for those who decode in their own loop; all by default.

        Raises:
            ValueError: If a position is out of range.
            StoreDamagedError: If a set was altered.
        """
        physical = self._physical(rows)
        counts = self._counts(physical)
        width = self.manifest.nodes or (int(counts.max()) if len(counts) else 0)
        codec, channels = self.manifest.codec, self.manifest.channels
        encoded: NDArray[np.uint8] | None = None
        for shard, at, local in self._by_shard(physical):
            part = shard.nodes(local, width)
            if len(at) == len(physical):
                encoded = part
                break
            if encoded is None:
                encoded = np.empty((len(physical), *part.shape[1:]), np.uint8)
            encoded[at] = part
        if encoded is None:
            encoded = np.empty((0, width, node_bytes(codec, channels)), np.uint8)
        return to_tensors(*split(encoded, codec, channels), counts)

    def places(self, rows: RowsLike) -> SetPlaces | None:
        """Where some sets lie, for those who read and decode in their own loop.

        Returns:
            ``None`` where N varies, or a set was not held against its checksum yet: then
            :meth:`read_encoded` does.

        Raises:
            ValueError: If a position is out of range.
        """
        nodes = self.manifest.nodes
        if nodes is None:
            return None
        physical = self._physical(rows)
        size = nodes * node_bytes(self.manifest.codec, self.manifest.channels)
        files, offsets = np.empty_like(physical), np.empty_like(physical)
        for shard, at, local in self._by_shard(physical):
            file = shard.checked_file(local)
            if file is None:
                return None
            files[at] = file
            offsets[at] = local * size
        return SetPlaces(files, offsets, self._shards)

    def nodes(self, rows: RowsLike | None = None) -> Tensor:
        """Some sets, decoded; all by default. Shape: ``[n, N, D]``, float32.

        Where N varies, smaller sets end in zero nodes (see :meth:`counts`).

        Raises:
            ValueError: If a position is out of range.
            StoreDamagedError: If a set was altered.
        """
        return self.read_encoded(rows).decode()

    def global_vectors(self, rows: RowsLike | None = None) -> Tensor:
        """Global vectors of some sets; all by default. Shape: ``[n, G]``, float32.

        Raises:
            ValueError: If the store has none, or a position is out of range.
            StoreDamagedError: If a vector was altered.
        """
        if self.manifest.global_channels is None:
            raise ValueError(
                f"store: {self.path.name} has no global vectors; create it with global_channels"
            )
        physical = self._physical(rows)
        vectors = np.empty((len(physical), self.manifest.global_channels), np.float32)
        for shard, at, local in self._by_shard(physical):
            vectors[at] = shard.global_vectors(local)
        return torch.from_numpy(vectors)

    def delete(self, ids: IdsLike) -> None:
        """Delete some sets; this view sees it at once, others when they refresh.

        The bytes stay in the shards, the positions behind the deleted sets move up.

        Raises:
            TypeError: If the store's ids are of the other kind.
            ValueError: If ids are not in the store, or named twice.
            StoreLockedError: If a writer has the store.
        """
        lock = WriterLock(self.path)
        try:
            now = LocalFeatureStore(self.path)
            physical = now._physical(now.rows_of(ids))
            if not len(physical):
                return
            dead = np.union1d(now._dead, physical)
            if len(dead) < len(now._dead) + len(physical):
                raise ValueError("ids: expected each id once, got some twice")
            data = dead.astype("<i8").tobytes()
            manifest = replace(
                now.manifest,
                deleted=len(dead),
                deleted_file=FileRecord(len(data), zlib.crc32(data)),
            )
            write_synced(inside(self.path, manifest.deleted_name), data)
            write_manifest(self.path, manifest)
            if now.manifest.deleted:
                (self.path / now.manifest.deleted_name).unlink(missing_ok=True)
        finally:
            lock.release()
        self.refresh()

    def verify(self) -> None:
        """Read every file from end to end and hold it against its checksum.

        Raises:
            StoreDamagedError: Naming every file that is truncated or altered.
        """
        problems = [text for shard in self._shards for text in shard.problems()]
        if problems:
            raise StoreDamagedError(f"store: {'; '.join(problems)}")

    def _find(self, ids: Ids) -> Rows:
        """Rows of ids with deleted ones counted, -1 where there is none."""
        keys = id_keys(ids)
        if len(self._shards) == 1:
            found = self._shards[0].find(ids, keys)
        else:
            found = np.full(len(ids), -1)
            # From the last shard to the first: an id is stored again only after its deletion.
            for shard, start in zip(reversed(self._shards), self._starts[-2::-1], strict=True):
                left = np.flatnonzero(found < 0)
                if not len(left):
                    break
                some = ids[left] if isinstance(ids, np.ndarray) else [ids[i] for i in left]
                local = shard.find(some, keys[left])
                found[left] = np.where(local >= 0, local + start, -1)
        if len(self._dead):
            place = np.searchsorted(self._dead, found).clip(max=len(self._dead) - 1)
            found[self._dead[place] == found] = -1
        return found

    def _counts(self, physical: Rows) -> Rows:
        if self.manifest.nodes is not None:
            return np.full(len(physical), self.manifest.nodes)
        counts = np.empty(len(physical), np.int64)
        for shard, at, local in self._by_shard(physical):
            counts[at] = shard.counts(local)
        return counts

    def _physical(self, rows: RowsLike | None) -> Rows:
        """Positions with the deleted rows in front of them counted in."""
        places = np.arange(len(self)) if rows is None else _check_rows(rows, len(self))
        if not len(self._dead):
            return places
        return places + np.searchsorted(self._gaps, places, side="right")

    def _by_shard(self, physical: Rows) -> Iterable[tuple[ShardReader, Rows, Rows]]:
        """For each shard that is asked for: itself, which answers are its, and its rows."""
        if len(self._shards) == 1:
            if len(physical):
                yield self._shards[0], np.arange(len(physical)), physical
            return
        shard_of = np.searchsorted(self._starts, physical, side="right") - 1
        for number in np.unique(shard_of).tolist():
            at = np.flatnonzero(shard_of == number)
            yield self._shards[number], at, physical[at] - self._starts[number]


def check_ids(name: str, ids: IdsLike, kind: str) -> Ids:
    """Ids as an int64 array or a list of strings, whatever of the two the store has.

    Raises:
        TypeError: If they are of the other kind.
        ValueError: If they are not one-dimensional, or an id is an empty string.
    """
    if isinstance(ids, str | bytes):
        raise TypeError(f"{name}: expected a sequence of ids, got a single {type(ids).__name__}")
    values: Any = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
    if kind == "string":
        texts = values.tolist() if isinstance(values, np.ndarray) else list(values)
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"{name}: the store's ids are strings, got {wrong!r}")
        if "" in texts:
            raise ValueError(f"{name}: expected no empty string, got one at {texts.index('')}")
        return texts
    array = np.asarray(values)
    if not array.size:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: the store's ids are whole numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape [n], got {list(array.shape)}")
    if array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected numbers that fit int64, got {array.max()}")
    return array.astype(np.int64)


def _check_rows(rows: RowsLike, count: int) -> Rows:
    array = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if not array.size:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"rows: expected positions, whole numbers of shape [n]; got {array.dtype} "
            f"{list(array.shape)}"
        )
    places = array.astype(np.int64)
    if len(places) and not 0 <= places.min() <= places.max() < count:
        raise ValueError(
            f"rows: expected positions 0 to {count - 1}, got {places.min()} to {places.max()}"
        )
    return places


def _read_deleted(folder: Path, manifest: StoreManifest) -> Rows:
    if manifest.deleted_file is None:
        return np.empty(0, np.int64)
    path = inside(folder, manifest.deleted_name)
    crc, size = crc32_of(path, manifest.deleted_file.bytes)
    if size != manifest.deleted * 8 or crc != manifest.deleted_file.crc32:
        raise StoreDamagedError(f"store: {path} was altered: it does not fit its checksum")
    dead = np.fromfile(path, "<i8", manifest.deleted).astype(np.int64)
    if dead[0] < 0 or dead[-1] >= manifest.rows or (np.diff(dead) <= 0).any():
        raise StoreDamagedError(f"store: {path} lists no rows of the store in order")
    return dead
