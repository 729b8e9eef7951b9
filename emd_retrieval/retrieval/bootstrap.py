"""Bootstrap intervals over queries: of a mean, and of a paired difference of means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval, in the units of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    values: Float, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of a mean over queries.

    For a paired comparison pass the differences query by query: the same queries are then drawn for
    both methods.

    Args:
        values: One value a query. Shape: ``[q]``.
        seed: Seed of the resampling.
        resamples: How often the queries are drawn again.
        level: Coverage of the interval.

    Raises:
        ValueError: If there are no values, one is not finite, or ``level`` is no coverage.

    Example:
        >>> bootstrap_interval(np.array([1.0, 1.0, 1.0]))
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values: expected finite numbers [q], got shape {list(values.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    size, chunk = len(values), max(1, 4_000_000 // len(values))
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        draws = generator.integers(size, size=(count, size))
        means[start : start + count] = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
