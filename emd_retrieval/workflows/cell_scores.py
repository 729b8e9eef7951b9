"""Scores of Table 8's cells, query by query, to a table: gains over Raw with paired intervals.

A cell is one trained model. What is pooled, what is resampled and against what it is compared is
decided here; how it looks is decided in :mod:`emd_retrieval.reports.table8`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from emd_retrieval._checks import check_positive
from emd_retrieval.reports.table8 import paper_table8
from emd_retrieval.retrieval.metrics import METRICS

Float = NDArray[np.float64]

RAW = "raw"
METRIC_NAMES = tuple(METRICS.values())
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """One model of the table.

    Attributes:
        loss: The loss it is trained with.
        method: ``"raw"``, or the extractor of its sets.
        control: What is done otherwise than by the method; empty for the method itself.
        seed: The run's seed.
    """

    loss: str
    method: str
    control: str = ""
    seed: int = 0

    @property
    def variant(self) -> str:
        """Method and control in one word: ``fcn``, ``fcn-uniform``."""
        return f"{self.method}-{self.control}" if self.control else self.method

    def __str__(self) -> str:
        return f"{self.loss}/{self.variant}/seed{self.seed}"


@dataclass(frozen=True)
class CellSummary:
    """The scores of many cells as tables, in percent points.

    Attributes:
        cells: A row a loss, method, control and metric: ``value`` (mean over queries and seeds)
            with ``low`` and ``high``; ``gain`` over Raw and ``edge``, what the method itself has
            over the control, each with its bounds; ``spread`` and ``gain_spread``, the standard
            deviation over seeds; the paper's ``paper`` and ``paper_gain``.
        means: A row a method, control and metric: gain and edge averaged over the losses that have
            them, with bounds, and the paper's mean gain over the same losses.
    """

    cells: pd.DataFrame
    means: pd.DataFrame


def summarize_cells(
    scores: Mapping[Cell, pd.DataFrame], *, seed: int = 0, resamples: int = 10_000
) -> CellSummary:
    """Pool seeds, and put 95 % intervals on values, gains over Raw and gains over controls.

    A query's scores are averaged over seeds; then queries are drawn again, the same ones for every
    cell, so that all differences are paired. How far seeds differ is told apart from that. Cells of
    which different seeds are there are not held against each other: they have no gain or edge.

    Args:
        scores: For each cell a row a query and a column a metric, in percent.
        seed: Seed of the bootstrap.
        resamples: How often the queries are drawn again.

    Raises:
        ValueError: If there is no cell, or cells were scored on different queries.
    """
    _check_queries(scores)
    variants = list(dict.fromkeys(replace(cell, seed=0) for cell in scores))
    by_seed = {
        variant: {
            cell.seed: frame[list(METRIC_NAMES)].to_numpy(dtype=np.float64)
            for cell, frame in scores.items()
            if replace(cell, seed=0) == variant
        }
        for variant in variants
    }
    pooled = np.stack([np.mean(list(by_seed[v].values()), axis=0) for v in variants], axis=1)
    draws = bootstrap_means(pooled.reshape(len(pooled), -1), seed=seed, resamples=resamples)
    seeds = {variant: frozenset(by_seed[variant]) for variant in variants}
    sample = _Sample(variants, seeds, pooled.mean(axis=0), draws.reshape(-1, *pooled.shape[1:]))
    means = {v: {s: values.mean(axis=0) for s, values in by_seed[v].items()} for v in variants}
    return CellSummary(_cells(sample, means), _means(sample))


def bootstrap_means(values: Float, *, seed: int = 0, resamples: int = 10_000) -> Float:
    """Means of redrawn queries, many columns at once; the draws of ``bootstrap_interval``.

    Args:
        values: Shape: ``[q, m]``.
        seed: Seed of the resampling.
        resamples: How often the queries are drawn again.

    Returns:
        Shape: ``[resamples, m]``.
    """
    check_positive("resamples", resamples)
    generator = np.random.default_rng(seed)
    size = len(values)
    means = np.empty((resamples, values.shape[1]))
    chunk = max(1, _DRAWS_AT_ONCE // size)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        draws = generator.integers(size, size=(count, size))
        draws += size * np.arange(count)[:, None]
        # How often each query is drawn turns all columns' means into one matrix product.
        times = np.bincount(draws.ravel(), minlength=count * size).reshape(count, size)
        means[start : start + count] = times.astype(np.float64) @ values / size
    return means


class _Sample:
    """Means of the variants, and the same of every resample: differences are paired by nature."""

    def __init__(
        self,
        variants: Sequence[Cell],
        seeds: Mapping[Cell, frozenset[int]],
        mean: Float,
        draws: Float,
    ) -> None:
        self.variants = variants
        self._seeds = seeds
        self._place = {variant: place for place, variant in enumerate(variants)}
        self._mean = mean
        self._draws = draws

    def compares(self, variant: Cell, other: Cell) -> bool:
        """Whether both are there, of the same seeds."""
        return {variant, other} <= self._seeds.keys() and (
            self._seeds[variant] == self._seeds[other]
        )

    def interval(
        self, name: str, variants: Sequence[Cell], against: Sequence[Cell] = ()
    ) -> list[dict[str, float]]:
        """Mean and bounds for each metric: of the variants, less those they are held against."""
        mean, draws = self._average(variants)
        if against:
            other, other_draws = self._average(against)
            mean, draws = mean - other, draws - other_draws
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        before = "" if name == "value" else f"{name}_"
        return [
            {name: float(mean[i]), f"{before}low": float(low[i]), f"{before}high": float(high[i])}
            for i in range(len(METRIC_NAMES))
        ]

    def _average(self, variants: Sequence[Cell]) -> tuple[Float, Float]:
        places = [self._place[variant] for variant in variants]
        return self._mean[places].mean(axis=0), self._draws[:, places].mean(axis=1)


def _cells(sample: _Sample, means: Mapping[Cell, Mapping[int, Float]]) -> pd.DataFrame:
    paper = paper_table8().set_index(["loss", "method"])
    rows: list[dict[str, Any]] = []
    for variant in sample.variants:
        raw, method = _raw_of(variant), replace(variant, control="")
        seeds = means[variant]
        spread = _spread([seeds[s] for s in seeds])
        value = sample.interval("value", [variant])
        gain = sample.interval("gain", [variant], [raw]) if _gains(sample, variant) else None
        edge = sample.interval("edge", [method], [variant]) if _edges(sample, variant) else None
        for i, metric in enumerate(METRIC_NAMES):
            row: dict[str, Any] = {
                "loss": variant.loss,
                "method": variant.method,
                "control": variant.control,
                "metric": metric,
                "seeds": len(seeds),
                **value[i],
                "spread": float(spread[i]),
            }
            if gain is not None:
                gain_spread = _spread([seeds[s] - means[raw][s] for s in seeds])
                row |= {**gain[i], "gain_spread": float(gain_spread[i])}
            if edge is not None:
                row |= edge[i]
            if not variant.control and (variant.loss, variant.method) in paper.index:
                printed = paper[metric]
                row["paper"] = float(printed[variant.loss, variant.method])
                if variant.method != RAW:
                    row["paper_gain"] = row["paper"] - float(printed[variant.loss, RAW])
            rows.append(row)
    columns = [
        "loss", "method", "control", "metric", "seeds", "value", "low", "high", "spread",
        "gain", "gain_low", "gain_high", "gain_spread", "edge", "edge_low", "edge_high",
        "paper", "paper_gain",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _means(sample: _Sample) -> pd.DataFrame:
    """Gains and edges averaged over losses: queries are drawn again, losses are what they are."""
    paper = paper_table8().set_index(["loss", "method"])
    rows: list[dict[str, Any]] = []
    for method, control in dict.fromkeys((v.method, v.control) for v in sample.variants):
        variants = [
            variant
            for variant in sample.variants
            if (variant.method, variant.control) == (method, control) and _gains(sample, variant)
        ]
        if not variants:
            continue
        gain = sample.interval("gain", variants, [_raw_of(variant) for variant in variants])
        compared = [variant for variant in variants if _edges(sample, variant)]
        edge = None
        if compared:
            methods = [replace(variant, control="") for variant in compared]
            edge = sample.interval("edge", methods, compared)
        known = [v.loss for v in variants if (v.loss, method) in paper.index and not control]
        for i, metric in enumerate(METRIC_NAMES):
            row: dict[str, Any] = {
                "method": method,
                "control": control,
                "metric": metric,
                "losses": len(variants),
                **gain[i],
                **(edge[i] if edge is not None else {}),
            }
            if known:
                printed = paper[metric]
                row["paper_gain"] = float(
                    np.mean([printed[loss, method] - printed[loss, RAW] for loss in known])
                )
            rows.append(row)
    columns = [
        "method", "control", "metric", "losses", "gain", "gain_low", "gain_high",
        "edge", "edge_low", "edge_high", "paper_gain",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _raw_of(variant: Cell) -> Cell:
    return replace(variant, method=RAW, control="")


def _gains(sample: _Sample, variant: Cell) -> bool:
    return variant.method != RAW and sample.compares(variant, _raw_of(variant))


def _edges(sample: _Sample, variant: Cell) -> bool:
    return bool(variant.control) and sample.compares(variant, replace(variant, control=""))


def _spread(means: Sequence[Float]) -> Float:
    """Standard deviation over seeds; of one seed there is none."""
    if len(means) < 2:
        return np.full(len(METRIC_NAMES), np.nan)
    spread: Float = np.std(means, axis=0, ddof=1)
    return spread


def _check_queries(scores: Mapping[Cell, pd.DataFrame]) -> None:
    if not scores:
        raise ValueError("scores: expected at least one cell, got none")
    first, frame = next(iter(scores.items()))
    for cell, other in scores.items():
        if not other.index.equals(frame.index):
            raise ValueError(
                f"scores: {cell} was scored on {len(other)} queries, {first} on {len(frame)} or "
                "on others; all cells need the same test images"
            )
