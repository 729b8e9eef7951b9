"""The one progress bar of the package: long work shows itself; pipes and quiet runs do not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_quiet: ContextVar[bool] = ContextVar("emd_retrieval_quiet", default=False)


@contextmanager
def quiet(enabled: bool = True) -> Iterator[None]:
    """Silence every progress bar inside the ``with`` block."""
    token = _quiet.set(enabled)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_silent() -> bool:
    """Whether progress would be hidden now: inside :func:`quiet`, or stderr is not a terminal."""
    return _quiet.get() or not sys.stderr.isatty()


def progress(
    items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Yield from ``items`` under a progress bar on stderr.

    Args:
        items: What to iterate over.
        description: What the work is, in a word or two.
        total: Number of items, where ``len(items)`` does not tell.
        unit: What one item is, for instance ``"image"``.

    Example:
        >>> list(progress([1, 2, 3], "counting", unit="number"))
        [1, 2, 3]
    """
    yield from tqdm(
        items, desc=description, total=total, unit=f" {unit}", disable=is_silent(), leave=False
    )


@contextmanager
def progress_counter(
    description: str | None, *, total: int, unit: str = "it"
) -> Iterator[tqdm[Any]]:
    """A bar to be moved by hand, with ``bar.update(n)``; without a description none is shown."""
    hidden = description is None or is_silent()
    with tqdm(total=total, desc=description, unit=f" {unit}", disable=hidden, leave=False) as bar:
        yield bar
