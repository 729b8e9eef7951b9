"""One writer a folder: a lock that the operating system frees when its process dies."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

LOCK = "writer.lock"


class StoreLockedError(RuntimeError):
    """Another writer has the store, or a run's folder; the message says which process."""


# POSIX locks exclude processes only, and fork hands none on, so that decoding processes which
# outlive a killed writer do not keep its lock. Writers of one process exclude each other here.
_held: dict[tuple[int, int], int] = {}
# Re-entrant, as a writer may be collected while another lock is taken.
_guard = threading.RLock()


class WriterLock:
    """The right to write to a store, from construction to :meth:`release`.

    Args:
        folder: The store's folder, which exists.
        patience: Seconds to wait for another writer.
        name: What the folder is, if no store.

    Raises:
        StoreLockedError: If another writer, of this process or any other, has it.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0, name: str = "store") -> None:
        deadline = time.monotonic() + patience
        while (held := self._take(folder)) is None:
            if time.monotonic() >= deadline:
                raise StoreLockedError(
                    f"{name}: {folder} is being written by {_holder(folder)}; a {name} has one "
                    "writer at a time"
                )
            time.sleep(0.05)
        # A writer that is dropped without being closed lets the next one in, too.
        self._free = weakref.finalize(self, _free, held, _identity(held), os.getpid())
        self._free.atexit = False

    @staticmethod
    def _take(folder: Path) -> int | None:
        # Imported here, so that stores can be read where this kind of lock does not exist.
        import fcntl

        path = folder / LOCK
        with _guard:
            # Closing any handle of a locked file frees the lock, so one that is held by this very
            # process must not even be opened.
            if path.exists():
                status = path.stat()
                if _held.get((status.st_dev, status.st_ino)) == os.getpid():
                    return None
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                _held[_identity(handle)] = os.getpid()
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
        return handle

    def release(self) -> None:
        """Let the next writer in; again is harmless."""
        self._free()


def _free(handle: int, key: tuple[int, int], process: int) -> None:
    with _guard:
        try:
            # A forked process has a copy of the lock's holder, but not the lock.
            if process == os.getpid():
                _held.pop(key, None)
                with suppress(OSError):  # the process id is for messages only
                    os.ftruncate(handle, 0)
        finally:
            os.close(handle)


def _identity(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino


def _holder(folder: Path) -> str:
    path = folder / LOCK
    with _guard:
        try:
            status = path.stat()
            if _held.get((status.st_dev, status.st_ino)) == os.getpid():
                return "another writer of this process"
            pid = path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            pid = ""
    return f"process {pid}" if pid else "another process"
