"""One shard of a store: a folder of files that only ever grow, read by row and written at the end.

ids.bin        int64, or the strings' UTF-8 one after the other, which id_ends.bin divides
nodes.bin      the encoded nodes, set after set; where N varies, node_ends.bin divides them
rows.crc       for each set the CRC-32 of its id followed by its nodes
global.bin     float32 global vectors, with a global.crc of the same kind
index-ROWS.bin the first ROWS ids in sorted order (strings by a 64-bit hash), then their rows
"""

from __future__ import annotations

import mmap
import os
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emd_retrieval.retrieval import _problems
from emd_retrieval.retrieval.store.codecs import node_bytes
from emd_retrieval.retrieval.store.manifest import (
    FileRecord,
    ShardRecord,
    StoreDamagedError,
    StoreManifest,
    inside,
)

Bytes = NDArray[np.uint8]
Rows = NDArray[np.int64]
Ids = NDArray[np.int64] | list[str]

_INDEX_ENTRY = 12  # a 64-bit key and a 32-bit row
_READ_AT_ONCE = 4 * 2**20
_OPEN_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def file_names(manifest: StoreManifest) -> list[str]:
    """The growing files of a shard, the id index apart."""
    names = ["ids.bin", "nodes.bin", "rows.crc"]
    names += ["id_ends.bin"] if manifest.ids == "string" else []
    names += ["node_ends.bin"] if manifest.nodes is None else []
    names += ["global.bin", "global.crc"] if manifest.global_channels else []
    return names


def index_name(rows: int) -> str:
    """Name of the id index over the first ``rows`` rows."""
    return f"index-{rows}.bin"


def id_keys(ids: Ids) -> NDArray[Any]:
    """What ids are sorted by: numbers by themselves, strings by a hash. Shape: ``[n]``."""
    if isinstance(ids, np.ndarray):
        return ids
    digests = b"".join(blake2b(encode_id(text), digest_size=8).digest() for text in ids)
    return np.frombuffer(digests, "<u8")


def id_text(value: object) -> str:
    """An id for a message: numbers plain, strings in quotes."""
    return repr(value) if isinstance(value, str) else str(value)


def encode_id(text: str) -> bytes:
    """UTF-8; the bytes of file names that are no UTF-8 pass through unchanged."""
    return text.encode("utf-8", "surrogateescape")


class ShardReader:
    """The committed rows of a shard; rows are checked when they are first read.

    Ids and checksums are memory-mapped, nodes and global vectors are read: the system maps up to 16
    pages around one that is touched, by which a process would come to hold most of a large file.

    Args:
        store: The store's folder.
        record: What is committed.
        manifest: How it is encoded.

    Raises:
        FileNotFoundError: If a file is missing.
        StoreDamagedError: If a file is shorter than what was committed, or of the wrong size.
    """

    def __init__(self, store: Path, record: ShardRecord, manifest: StoreManifest) -> None:
        self.record = record
        self.rows = record.rows
        self._manifest = manifest
        self._folder = inside(store, record.path)
        self._node_bytes = node_bytes(manifest.codec, manifest.channels)
        names = file_names(manifest)
        names += [index_name(record.indexed)] if record.indexed else []
        if sorted(names) != sorted(record.files):
            raise StoreDamagedError(
                f"store: {self._folder} has other files than its settings ask for: "
                f"{', '.join(sorted(set(names) ^ set(record.files)))}"
            )
        self._sizes = {name: file.bytes for name, file in record.files.items()}
        for name, size in self._expected_sizes().items():
            if self._sizes[name] != size:
                raise StoreDamagedError(
                    f"store: {self._folder / name}: the manifest says {self._sizes[name]} bytes, "
                    f"but {record.rows} rows take {size}"
                )
        for name, size in self._sizes.items():
            there = inside(self._folder, name).stat().st_size
            if there < size:
                raise StoreDamagedError(
                    f"store: {self._folder / name} is truncated: {there} bytes, {size} committed"
                )
        self._maps: dict[str, Bytes] = {}
        self._open: dict[str, int] = {}
        if record.indexed:
            # A writer may replace the index at any time; whoever has it mapped keeps it.
            self._map(index_name(record.indexed))
        self._checked: dict[str, NDArray[np.bool_]] = {}
        self._tail: tuple[NDArray[Any], NDArray[Any]] | None = None

    def ids(self, rows: Rows) -> Ids:
        """Ids at some rows."""
        if self._manifest.ids == "int64":
            return self._array("ids.bin", "<i8")[rows]
        data = self._map("ids.bin")
        starts, ends = self._spans("id_ends.bin", rows, len(data))
        return [
            data[a:b].tobytes().decode("utf-8", "surrogateescape")
            for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
        ]

    def counts(self, rows: Rows) -> Rows:
        """Nodes of some sets. Shape: ``[n]``."""
        if self._manifest.nodes is not None:
            return np.full(len(rows), self._manifest.nodes)
        starts, ends = self._spans("node_ends.bin", rows, self.record.nodes)
        return ends - starts

    def nodes(self, rows: Rows, width: int) -> Bytes:
        """Encoded nodes of some sets, zero-padded to ``width`` nodes.

        Shape:
            ``[n, width, node_bytes]``.

        Raises:
            StoreDamagedError: If a set does not fit its checksum.
        """
        size = self._node_bytes
        fixed = self._manifest.nodes
        if fixed is not None:
            read = self._read("nodes.bin", rows, rows * (fixed * size), None, fixed * size)
            self._check("nodes.bin", "rows.crc", rows, read)
            return read.reshape(len(rows), fixed, size)
        starts, ends = self._spans("node_ends.bin", rows, self.record.nodes)
        lengths = (ends - starts) * size
        read = self._read("nodes.bin", rows, starts * size, lengths, width * size)
        whole = [row[:length] for row, length in zip(read, lengths.tolist(), strict=True)]
        self._check("nodes.bin", "rows.crc", rows, whole)
        return read.reshape(len(rows), width, size)

    def global_vectors(self, rows: Rows) -> NDArray[np.float32]:
        """Global vectors of some rows. Shape: ``[n, G]``.

        Raises:
            StoreDamagedError: If a vector does not fit its checksum.
        """
        size = 4 * (self._manifest.global_channels or 0)
        read = self._read("global.bin", rows, rows * size, None, size)
        self._check("global.bin", "global.crc", rows, read)
        return read.view("<f4")

    def checked_file(self, rows: Rows) -> int | None:
        """The open file of the nodes if these rows were held against their checksums before."""
        checked = self._checked.get("nodes.bin")
        if checked is None or not checked[rows].all():
            return None
        return self._file("nodes.bin")

    def find(self, ids: Ids, keys: NDArray[Any]) -> Rows:
        """The latest row of each id, -1 where there is none. Shape: ``[n]``."""
        if self.record.indexed == self.rows:
            return self._search(*self._index(), ids, keys)
        found = self._search(*self._tail_index(), ids, keys)
        missing = np.flatnonzero(found < 0)
        if self.record.indexed and len(missing):
            some = ids[missing] if isinstance(ids, np.ndarray) else [ids[i] for i in missing]
            found[missing] = self._search(*self._index(), some, keys[missing])
        return found

    def problems(self, names: Iterable[str] | None = None) -> Iterator[str]:
        """What is wrong with the shard's files, one sentence a file; reads them from end to end."""
        for name, file in self.record.files.items():
            if names is not None and name not in names:
                continue
            path = self._folder / name
            crc, size = crc32_of(path, file.bytes)
            if size < file.bytes:
                yield f"{path} is truncated: {size} bytes, {file.bytes} committed"
            elif crc != file.crc32:
                yield f"{path} was altered: it does not fit its checksum{self._where(name)}"

    def id_files(self) -> list[str]:
        """The files that a look-up of ids relies on."""
        return [name for name in self.record.files if name.startswith(("id", "index"))]

    def _expected_sizes(self) -> dict[str, int]:
        record, manifest = self.record, self._manifest
        sizes = {
            "nodes.bin": record.nodes * self._node_bytes,
            "rows.crc": record.rows * 4,
            "global.bin": record.rows * (manifest.global_channels or 0) * 4,
            "global.crc": record.rows * 4,
            "id_ends.bin": record.rows * 8,
            "node_ends.bin": record.rows * 8,
            index_name(record.indexed): record.indexed * _INDEX_ENTRY,
        }
        if manifest.ids == "int64":
            sizes["ids.bin"] = record.rows * 8
        if manifest.nodes is not None and record.nodes != record.rows * manifest.nodes:
            raise StoreDamagedError(
                f"store: {self._folder}: the manifest says {record.nodes} nodes in {record.rows} "
                f"sets of {manifest.nodes}"
            )
        return {name: size for name, size in sizes.items() if name in record.files}

    def _map(self, name: str) -> Bytes:
        if name not in self._maps:
            size = self._sizes[name]
            if not size:
                self._maps[name] = np.empty(0, np.uint8)
            else:
                with (self._folder / name).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
                if hasattr(mmap, "MADV_RANDOM"):
                    # Without it the system reads neighbours of every row into memory.
                    mapped.madvise(mmap.MADV_RANDOM)
                self._maps[name] = np.frombuffer(mapped, np.uint8)
        return self._maps[name]

    def _file(self, name: str) -> int:
        """Descriptor of a file that stays open as long as this reader."""
        if name not in self._open:
            handle = os.open(self._folder / name, os.O_RDONLY | _OPEN_FLAGS)
            weakref.finalize(self, os.close, handle)
            if hasattr(os, "posix_fadvise"):
                # Without it the system reads neighbours of every row into its cache.
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            self._open[name] = handle
        return self._open[name]

    def _read(self, name: str, rows: Rows, starts: Rows, lengths: Rows | None, width: int) -> Bytes:
        """Bytes at some places of a file, a row each, zero behind its length."""
        read = np.empty((len(rows), width), np.uint8)
        if not read.size:
            return read
        place, error = _problems.read_rows(
            self._file(name), starts, lengths, read, torch.get_num_threads()
        )
        if place >= 0:
            path = self._folder / name
            if error:
                raise OSError(error, os.strerror(error), str(path))
            raise StoreDamagedError(
                f"store: {path} is truncated: it ends before row {rows[place]} does (id "
                f"{id_text(self.ids(rows[place : place + 1])[0])})"
            )
        return read

    def _array(self, name: str, dtype: str) -> NDArray[Any]:
        return self._map(name).view(dtype)

    def _spans(self, name: str, rows: Rows, total: int) -> tuple[Rows, Rows]:
        """Where the parts at some rows start and end."""
        ends = self._array(name, "<i8")
        first, last = np.where(rows > 0, ends[rows - 1], 0), ends[rows]
        wrong = (first < 0) | (last <= first) | (last > total)
        if wrong.any():
            raise StoreDamagedError(
                f"store: {self._folder / name} was altered: row {rows[wrong][0]} goes from "
                f"{first[wrong][0]} to {last[wrong][0]} of {total}"
            )
        return first, last

    def _check(self, name: str, checksums: str, rows: Rows, parts: Sequence[Any] | Bytes) -> None:
        """Hold rows that were read for the first time against their checksums."""
        checked = self._checked.setdefault(name, np.zeros(self.rows, bool))
        new = np.flatnonzero(~checked[rows])
        if not len(new):
            return
        expected = self._array(checksums, "<u4")[rows[new]].tolist()
        for i, crc, key in zip(new.tolist(), expected, self._id_bytes(rows[new]), strict=True):
            if zlib.crc32(parts[i], zlib.crc32(key)) != crc:
                raise StoreDamagedError(
                    f"store: {self._folder / name} was altered: row {rows[i]} (id "
                    f"{id_text(self.ids(rows[i : i + 1])[0])}) does not fit its checksum"
                )
        checked[rows[new]] = True

    def _id_bytes(self, rows: Rows) -> list[bytes]:
        ids = self.ids(rows)
        if isinstance(ids, np.ndarray):
            return [row.tobytes() for row in ids]
        return [encode_id(text) for text in ids]

    def _index(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Sorted keys and their rows, from the index file."""
        data = self._map(index_name(self.record.indexed))
        split = self.record.indexed * 8
        dtype = "<i8" if self._manifest.ids == "int64" else "<u8"
        return data[:split].view(dtype), data[split:].view("<u4")

    def _tail_index(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The rows that the index file does not have yet, sorted once, in memory."""
        if self._tail is None:
            rows = np.arange(self.record.indexed, self.rows)
            keys = id_keys(self.ids(rows))
            order = np.argsort(keys, kind="stable")
            self._tail = keys[order], rows[order]
        return self._tail

    def _search(
        self, sorted_keys: NDArray[Any], rows: NDArray[Any], ids: Ids, keys: NDArray[Any]
    ) -> Rows:
        if not len(sorted_keys):
            return np.full(len(keys), -1)
        # Of equal keys the last is the latest row: an id is stored again only after its deletion.
        last = sorted_keys.searchsorted(keys, side="right") - 1
        # Before the first key comes the last one, which is not equal either, or is the only one.
        same = (sorted_keys[last] == keys) & (last >= 0)
        if same.all():
            hits, candidates = np.arange(len(keys)), rows[last].astype(np.int64)
        else:
            hits = np.flatnonzero(same)
            candidates = rows[last[hits]].astype(np.int64)
        if len(candidates) and candidates.max() >= self.rows:
            raise StoreDamagedError(f"store: {self._folder}: the id index was altered")
        stored = self.ids(candidates)
        found = np.full(len(keys), -1)
        if isinstance(ids, np.ndarray):
            wrong = np.not_equal(stored, ids[hits])
            if wrong.any():
                place = hits[np.flatnonzero(wrong)[0]]
                raise StoreDamagedError(
                    f"store: {self._folder}: the id index and ids.bin disagree on id {ids[place]}"
                )
            found[hits] = candidates
            return found
        for hit, row, name in zip(hits.tolist(), candidates.tolist(), stored, strict=True):
            place = int(last[hit])
            # Different strings of one hash lie side by side.
            while name != ids[hit]:
                place -= 1
                if place < 0 or sorted_keys[place] != keys[hit]:
                    row = -1
                    break
                row = int(rows[place])
                name = self.ids(np.array([row]))[0]
            found[hit] = row
        return found

    def _where(self, name: str) -> str:
        """Which rows are damaged, where that can be told."""
        if name not in ("nodes.bin", "global.bin"):
            return ""
        self._checked.pop(name, None)
        damaged: list[str] = []
        for row in range(self.rows):
            at = np.array([row])
            try:
                if name == "nodes.bin":
                    self.nodes(at, int(self.counts(at)[0]))
                else:
                    self.global_vectors(at)
            except StoreDamagedError:
                damaged.append(f"row {row}")
        shown = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        return f" (damaged: {len(damaged)} of {self.rows} sets: {shown})" if damaged else ""


class ShardWriter:
    """The growing end of a shard. Nothing that it writes counts before a manifest says so.

    Args:
        store: The store's folder.
        record: What is committed; what the files hold beyond it is cut off.
        manifest: How it is encoded.
    """

    def __init__(self, store: Path, record: ShardRecord, manifest: StoreManifest) -> None:
        self._folder = inside(store, record.path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manifest = manifest
        self._committed = record
        self.path = record.path
        self.rows = record.rows
        self.indexed = record.indexed
        self._nodes = record.nodes
        self._files: dict[str, FileIO] = {}
        self._records = {
            name: record.files.get(name, FileRecord()) for name in file_names(manifest)
        }
        if record.indexed:
            name = index_name(record.indexed)
            self._records[name] = record.files[name]
        try:
            for name in file_names(manifest):
                path = inside(self._folder, name)
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                self._files[name] = FileIO(handle, "r+")
            self.roll_back()
        except BaseException:
            self.close()
            raise

    def append(
        self, ids: Ids, sets: Sequence[Bytes], global_vectors: NDArray[np.float32] | None
    ) -> None:
        """Write sets behind the others.

        Args:
            ids: One a set.
            sets: Encoded nodes of each set. Shape of one: ``[N, node_bytes]``.
            global_vectors: Shape: ``[n, G]``.
        """
        if isinstance(ids, np.ndarray):
            keys = [key.tobytes() for key in ids.astype("<i8")]
        else:
            keys = [encode_id(text) for text in ids]
            ends = self._records["ids.bin"].bytes + np.cumsum([len(key) for key in keys])
            self._write("id_ends.bin", ends.astype("<i8").tobytes())
        self._write("ids.bin", b"".join(keys))
        seeds = [zlib.crc32(key) for key in keys]
        pieces = [np.ascontiguousarray(part).data.cast("B") for part in sets]
        crcs = [zlib.crc32(piece, seed) for piece, seed in zip(pieces, seeds, strict=True)]
        if self._manifest.nodes is None:
            ends = self._nodes + np.cumsum([len(part) for part in sets])
            self._write("node_ends.bin", ends.astype("<i8").tobytes())
        self._write("nodes.bin", b"".join(pieces))
        self._write("rows.crc", np.array(crcs, "<u4").tobytes())
        if global_vectors is not None:
            vectors = global_vectors.astype("<f4")
            crcs = [zlib.crc32(v.data, s) for v, s in zip(vectors, seeds, strict=True)]
            self._write("global.bin", vectors.tobytes())
            self._write("global.crc", np.array(crcs, "<u4").tobytes())
        self._nodes += sum(len(part) for part in sets)
        self.rows += len(keys)

    def build_index(self) -> None:
        """Sort all ids into a new index file; the old one stays until the manifest has the new."""
        if self.indexed == self.rows:
            return
        reader = ShardReader(self._folder.parent, self._plain_record(), self._manifest)
        keys = id_keys(reader.ids(np.arange(self.rows)))
        order = np.argsort(keys, kind="stable")
        data = keys[order].tobytes() + order.astype("<u4").tobytes()
        self._records.pop(index_name(self.indexed), None)
        self.indexed = self.rows
        name = index_name(self.rows)
        write_synced(self._folder / name, data)
        self._records[name] = FileRecord(len(data), zlib.crc32(data))

    def record(self) -> ShardRecord:
        """The shard with all that was written, for a manifest."""
        return ShardRecord(self.path, self.rows, self._nodes, self.indexed, dict(self._records))

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def committed(self) -> None:
        """A manifest has :meth:`record` now: index files that it does not name can go."""
        self._committed = self.record()
        self._remove_indexes(self._committed)

    def roll_back(self, named: ShardRecord | None = None) -> None:
        """Cut off what no manifest has, so that a full disk gets its room back.

        Args:
            named: The shard as the manifest on disk has it; by default as the last commit left it.
        """
        kept = self._committed if named is None else named
        for name, file in self._files.items():
            size = kept.files.get(name, FileRecord()).bytes
            if os.fstat(file.fileno()).st_size > size:
                file.truncate(size)
            file.seek(size)
        self._remove_indexes(kept)

    def _remove_indexes(self, kept: ShardRecord) -> None:
        for path in self._folder.glob("index-*.bin"):
            if path.name not in kept.files:
                path.unlink()

    def close(self) -> None:
        """Close the files; again is harmless."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _plain_record(self) -> ShardRecord:
        files = {name: self._records[name] for name in self._files}
        return ShardRecord(self._folder.name, self.rows, self._nodes, 0, files)

    def _write(self, name: str, data: bytes) -> None:
        view = memoryview(data)
        try:
            while len(view):
                view = view[self._files[name].write(view) :]
        except OSError as error:
            error.filename = str(self._folder / name)
            raise
        old = self._records[name]
        self._records[name] = FileRecord(old.bytes + len(data), zlib.crc32(data, old.crc32))


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that counts once a manifest names it; if that fails, nothing is left of it.

    Raises:
        OSError: Naming the file.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def crc32_of(path: Path, size: int) -> tuple[int, int]:
    """CRC-32 of the first ``size`` bytes of a file, and how many of them are there."""
    crc = read = 0
    with path.open("rb") as file:
        while read < size:
            part = file.read(min(_READ_AT_ONCE, size - read))
            if not part:
                break
            crc = zlib.crc32(part, crc)
            read += len(part)
    return crc, read
