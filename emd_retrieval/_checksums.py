"""Telling an altered file from a whole one: seals for JSON, tensors, tables and archives.

A seal is a SHA-256 of the content that travels in the file itself. It finds damage, not an author;
files without one, of earlier releases, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emd_retrieval._files import whole_file

SEAL = "sha256"
# The last bytes of an archive without a comment: a signature, and the number of its members.
_ZIP_END = struct.Struct("<4s6xH10x")


class AlteredError(ValueError):
    """A file does not fit its own checksum; the message names it."""


def json_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain JSON values, whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values with their seal as the last entry."""
    plain = json.loads(json.dumps(content))
    return {**plain, SEAL: json_digest(plain)}


def unsealed(content: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values that :func:`sealed` was given.

    Raises:
        AlteredError: If they were altered since.
    """
    # Without a seal under its name, the last entry may be one whose name was altered.
    is_sealed = SEAL in content
    name = SEAL if is_sealed else [SEAL, *content][-1]
    body = {key: value for key, value in content.items() if key != name}
    fits = content.get(name) == json_digest(body)
    if not is_sealed and not fits:
        return dict(content)
    if not is_sealed or not fits:
        raise AlteredError(f"{what} was altered: it does not fit its checksum")
    return body


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, whatever their order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a sealed safetensors file, whole or not at all.

    Raises:
        OSError: If it cannot be written, for instance because the disk is full.
    """
    with whole_file(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata={SEAL: tensors_digest(tensors)})
        except Exception as error:
            # The library has an error of its own for a full disk.
            raise OSError(f"{path} could not be written ({error})") from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file; an :class:`AlteredError` if it was altered since
            :func:`save_tensors` wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    if metadata and metadata.get(SEAL) != tensors_digest(tensors):
        raise AlteredError(f"{path} was altered: it does not fit its checksum")
    return tensors


def save_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a sealed parquet table, index included, whole or not at all."""
    arrow = pa.Table.from_pandas(table)
    seal = {SEAL.encode(): _table_digest(table).encode()}
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **seal})
    with whole_file(path) as partial:
        pq.write_table(arrow, partial, write_page_checksum=True)


def load_table(path: str | Path) -> pd.DataFrame:
    """Read a parquet table.

    Raises:
        ValueError: If it is no such table; an :class:`AlteredError` if it was altered since
            :func:`save_table` wrote it.
    """
    try:
        arrow = pq.read_table(path, page_checksum_verification=True)
        table: pd.DataFrame = arrow.to_pandas()
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable table ({error})") from error
    seal = (arrow.schema.metadata or {}).get(SEAL.encode())
    if seal is not None and seal != _table_digest(table).encode():
        raise AlteredError(f"{path} was altered: it does not fit its checksum")
    return table


def _table_digest(table: pd.DataFrame) -> str:
    return hashlib.sha256(table.to_csv().encode()).hexdigest()


def check_checkpoint(path: str | Path) -> None:
    """Hold a checkpoint of torch's against its checksums, which torch does not look at.

    Raises:
        ValueError: If it is truncated or damaged; an :class:`AlteredError` if a member was altered.
    """
    check_archive(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # its reader takes offence at fields that no checksum is over
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0][:200]})") from error


def check_archive(path: str | Path) -> None:
    """Hold every member of a zip archive against its CRC-32, and their number against its end.

    Raises:
        ValueError: If the archive is truncated; an :class:`AlteredError` if a member was altered
            or is hidden.
    """
    try:
        with ZipFile(path) as archive:
            bad = archive.testzip()
            count = len(archive.infolist())
        with Path(path).open("rb") as file:
            file.seek(-_ZIP_END.size, os.SEEK_END)
            signature, listed = _ZIP_END.unpack(file.read())
    except FileNotFoundError:
        raise
    except Exception as error:  # of zipfile and its decompressors, whatever damage makes of them
        raise ValueError(f"{path} is truncated or damaged ({error})") from error
    if bad is not None:
        raise AlteredError(f"{path} was altered: {bad} does not fit its checksum")
    # An altered entry of the list can swallow those behind it. Large archives count elsewhere.
    if signature == b"PK\5\6" and listed not in (count, 0xFFFF):
        raise AlteredError(f"{path} was altered: it lists {count} of its {listed} members")
