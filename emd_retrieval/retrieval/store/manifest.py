"""The manifest of a store: what is committed, how it is encoded, and what every file must be.

One small JSON file, replaced as a whole by each commit; it alone says which bytes of the other
files count. It carries its own checksum, and no name in it can lead out of the store's folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from emd_retrieval._checksums import SEAL, json_digest, sealed
from emd_retrieval.retrieval.store.codecs import CODECS

MANIFEST = "store.json"
FORMAT = "emd_retrieval local features"
VERSION = 1
ID_KINDS = ("int64", "string")
SHARD_ROWS = 2**22
SHARD_NAME = re.compile(r"(part-\d{5}-of-\d{5}/)?shard-\d{6}")
_FILE_NAME = re.compile(r"[a-z_]+(-\d+)?\.(bin|crc)")
# What a manifest is at most: a hostile one must not fill the memory before it is refused.
_LARGEST = 256 * 2**20


class StoreDamagedError(ValueError):
    """A file of a store is missing, shorter than committed, or altered; the message names it."""


@dataclass(frozen=True)
class FileRecord:
    """Committed part of a file: its first ``bytes`` bytes, and their CRC-32."""

    bytes: int = 0
    crc32: int = 0


@dataclass(frozen=True)
class ShardRecord:
    """One shard: a folder of files that only ever grow.

    Attributes:
        path: The shard's folder, relative to the store's.
        rows: Sets in it, deleted ones included.
        nodes: Nodes in it, over all sets.
        indexed: The first so many rows are in the sorted id index.
        files: The committed files by name.
    """

    path: str
    rows: int
    nodes: int
    indexed: int
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """What a store is.

    Attributes:
        channels: D, the channels of a node.
        nodes: N, the nodes of a set; ``None`` where it varies.
        codec: How nodes are encoded: ``"float32"``, ``"float16"`` or ``"int8"``.
        global_channels: Channels of the global vectors; ``None`` without them.
        ids: ``"int64"`` or ``"string"``.
        extractor: What the features came from, as plain JSON values.
        shard_rows: Sets a shard holds before the next one is started.
        shards: The shards, in the order of their rows.
        deleted: How many sets are deleted.
        deleted_file: The file that lists their rows; ``None`` while nothing is deleted.
        complete: The last writer closed the store; ``False`` while one is writing, or was killed.
    """

    channels: int
    nodes: int | None
    codec: str
    global_channels: int | None = None
    ids: str = "int64"
    extractor: Mapping[str, Any] = field(default_factory=dict)
    shard_rows: int = SHARD_ROWS
    shards: tuple[ShardRecord, ...] = ()
    deleted: int = 0
    deleted_file: FileRecord | None = None
    complete: bool = False
    version: int = VERSION

    @property
    def rows(self) -> int:
        """Sets in the store's files, deleted ones included."""
        return sum(shard.rows for shard in self.shards)

    @property
    def deleted_name(self) -> str:
        """Name of the file with the deleted rows."""
        return f"deleted-{self.deleted}.bin"

    def settings(self) -> dict[str, Any]:
        """What every append must agree with."""
        names = ("channels", "nodes", "codec", "global_channels", "ids", "extractor")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """The manifest with its own checksum, as text."""
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps(sealed(body), indent=1) + "\n"


def read_manifest(folder: Path) -> StoreManifest:
    """Read and check a store's manifest; no other file is looked at.

    Raises:
        FileNotFoundError: If there is no store.
        ValueError: If the manifest is of another version or format.
        StoreDamagedError: If it is altered, or names what no manifest may.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "no store (store.json is missing)" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"store: {folder}: {what}")
    if path.stat().st_size > _LARGEST:
        raise StoreDamagedError(f"store: {path} is larger than any manifest")
    try:
        # The reader's numbers are its own: a NaN or a huge integer must not pass as a count.
        data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StoreDamagedError(f"store: {path} is no manifest: not readable as JSON") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise StoreDamagedError(f"store: {path} is no manifest of local features")
    if data.get("version") != VERSION:
        raise ValueError(
            f"store: {folder} has format version {data.get('version')!r}; "
            f"this release reads version {VERSION}"
        )
    body = {name: value for name, value in data.items() if name != SEAL}
    if data.get(SEAL) != json_digest(body):
        raise StoreDamagedError(f"store: {path} was altered: it does not fit its checksum")
    try:
        manifest = _parse(body)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreDamagedError(f"store: {path} is malformed: {error}") from error
    return manifest


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Replace the manifest; after a crash at any moment the old or the new one is there, whole.

    Only the holder of the writer's lock may call this: the temporary name is always the same, so
    that a killed writer leaves nothing that the next one does not overwrite.
    """
    partial = folder / f"{MANIFEST}.partial"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / MANIFEST)
    except OSError as error:
        error.filename = str(folder / MANIFEST)
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make new and renamed files of a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, which must not lead out of the folder by links either.

    Raises:
        StoreDamagedError: If it does.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreDamagedError(f"store: {path} leads out of the store's folder")
    return path


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _parse(body: Mapping[str, Any]) -> StoreManifest:
    known = dict(body)
    del known["format"]
    shards = known.pop("shards")
    deleted_file = known.pop("deleted_file")
    manifest = StoreManifest(
        **known,
        shards=tuple(_parse_shard(shard) for shard in shards),
        deleted_file=None if deleted_file is None else _parse_file(deleted_file),
    )
    _integer("channels", manifest.channels, 1)
    for name in ("nodes", "global_channels"):
        if getattr(manifest, name) is not None:
            _integer(name, getattr(manifest, name), 1)
    _integer("shard_rows", manifest.shard_rows, 1)
    _integer("deleted", manifest.deleted, 0)
    _choice("codec", manifest.codec, CODECS)
    _choice("ids", manifest.ids, ID_KINDS)
    _choice("complete", manifest.complete, (True, False))
    if not isinstance(manifest.extractor, dict):
        raise ValueError(f"extractor: expected settings, got {manifest.extractor!r}")
    if len({shard.path for shard in manifest.shards}) < len(manifest.shards):
        raise ValueError("shards: one is named twice")
    if (manifest.deleted > 0) != (manifest.deleted_file is not None):
        raise ValueError(f"deleted: {manifest.deleted} does not fit deleted_file")
    return manifest


def _parse_shard(data: Mapping[str, Any]) -> ShardRecord:
    files = data["files"]
    shard = ShardRecord(**{**data, "files": {k: _parse_file(v) for k, v in files.items()}})
    if not isinstance(shard.path, str) or not SHARD_NAME.fullmatch(shard.path):
        raise ValueError(f"shards: {shard.path!r} is no name of a shard")
    for name in shard.files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"shards: {name!r} is no name of a shard's file")
    _integer("rows", shard.rows, 1)
    _integer("nodes", shard.nodes, 1)
    _integer("indexed", shard.indexed, 0)
    if shard.indexed > shard.rows:
        raise ValueError(f"indexed: {shard.indexed} of {shard.rows} rows")
    return shard


def _parse_file(data: Mapping[str, Any]) -> FileRecord:
    record = FileRecord(**data)
    _integer("bytes", record.bytes, 0)
    _integer("crc32", record.crc32, 0)
    return record


def _integer(name: str, value: object, least: int) -> None:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
