"""Whole files or none: what is written here goes to a temporary name first and is then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it when the block succeeds.

    A reader never sees a half-written file; if the block fails, what was there before stays.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with whole_file(folder / "notes.txt") as partial:
        ...     _ = partial.write_text("done")
        >>> [file.name for file in folder.iterdir()]
        ['notes.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_folder(path: str | Path, name: str = "output") -> None:
    """Find out before the work whether a folder can be written to after it; nothing is made.

    Raises:
        NotADirectoryError: If it is a file, or would lie below one.
        PermissionError: If it may not be written to.
    """
    place = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder, got {path}, but {place} is a file")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{name}: {path} cannot be written, {place} is read-only")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all, and return its path."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)
