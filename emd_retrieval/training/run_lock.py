"""One process at work in a run's folder: of those that train together, the first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from emd_retrieval.retrieval.store.lock import WriterLock


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, while this one trains in it.

    The lock is its process's and goes with it, so a killed run can be started again at once.

    Raises:
        StoreLockedError: If another process is at work there; it is named.
    """
    machine = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    if rank_zero_only.rank != 0 or machine != 0:  # type: ignore[attr-defined]
        yield  # its group's first process has the lock
        return
    run.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(run, name="run")
    try:
        yield
    finally:
        lock.release()
