"""One writer a store: a lock that the operating system frees when its process dies."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

LOCK = "writer.lock"


class StoreLockedError(RuntimeError):
    """Another writer has the store; the message says which process."""


# POSIX locks exclude processes only, and fork hands none on, so that decoding processes which
# outlive a killed writer do not keep its lock. Writers of one process exclude each other here.
_held: dict[tuple[int, int], int] = {}
_guard = threading.Lock()


class WriterLock:
    """The right to write to a store, from construction to :meth:`release`.

    Args:
        folder: The store's folder, which exists.
        patience: Seconds to wait for another writer.

    Raises:
        StoreLockedError: If another writer, of this process or any other, has it.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        deadline = time.monotonic() + patience
        while (held := self._take(folder)) is None:
            if time.monotonic() >= deadline:
                raise StoreLockedError(
                    f"store: {folder} is being written by {_holder(folder)}; a store has one "
                    "writer at a time"
                )
            time.sleep(0.05)
        self._handle: int | None = held
        self._key = _identity(held)

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
            except BlockingIOError:
                os.close(handle)
                return None
            except OSError:
                os.close(handle)
                raise
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            _held[_identity(handle)] = os.getpid()
        return handle

    def release(self) -> None:
        """Let the next writer in; again is harmless."""
        with _guard:
            if self._handle is not None:
                _held.pop(self._key, None)
                os.ftruncate(self._handle, 0)
                os.close(self._handle)
                self._handle = None


def _identity(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino


def _holder(folder: Path) -> str:
    path = folder / LOCK
    with _guard:
        status = path.stat()
        if _held.get((status.st_dev, status.st_ino)) == os.getpid():
            return "another writer of this process"
        pid = path.read_text(encoding="ascii", errors="replace").strip()
    return f"process {pid}" if pid else "another process"
