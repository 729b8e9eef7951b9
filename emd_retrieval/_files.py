"""Whole files or none: what is written here goes to a temporary name first and is then renamed."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where what a killed process left has to be removed by hand
    _LOCKS = False
else:
    _LOCKS = True


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it when the block succeeds.

    A reader never sees a half-written file; if the block fails, what was there before stays. What a
    killed process left half-written is removed by the next one that writes the same file.

    Raises:
        FileNotFoundError: If the block writes nothing.
        OSError: If the file cannot be written, for instance because the disk is full; it names the
            file.

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
    _sweep(target)
    try:
        partial, handle = _new_partial(target)
    except OSError as error:
        error.filename = str(target)
        raise
    try:
        yield partial
        if not partial.stat().st_mtime_ns:
            raise FileNotFoundError(f"nothing was written to {target}")
        # By its name: whoever wrote it may have put another file there.
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    except OSError as error:
        if error.errno is not None and (error.filename is None or error.filename == str(partial)):
            error.filename = str(target)
        raise
    finally:
        partial.unlink(missing_ok=True)
        os.close(handle)


def _new_partial(target: Path) -> tuple[Path, int]:
    """A new empty file beside the target, and its descriptor: locked while its process lives."""
    while True:
        partial = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _LOCKS:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            os.utime(partial, ns=(0, 0))  # by which it is seen whether anything is written to it
        except FileNotFoundError:
            os.close(handle)  # another process took it for a dead one's before it was locked
        else:
            return partial, handle


def _sweep(target: Path) -> None:
    """Remove what dead processes left of earlier attempts at a file: what nobody has locked."""
    if not _LOCKS:
        return
    name = f".{glob.escape(target.stem)}.{'[0-9a-f]' * 8}{glob.escape(target.suffix)}"
    for partial in target.parent.glob(name):
        with suppress(OSError):
            handle = os.open(partial, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(handle)


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
    """Write a text file in UTF-8, whole or not at all, and return its path.

    Names of files that are no UTF-8 are escaped; in JSON they read back as they were.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)
