"""Random transportation problems of every kind through the native simplex: does any of them fail?

Shapes from 1 x 1 to 64 x 64 (small ones more often), every kind of weights and costs that has
broken a solver before, float32 and float64. Each plan has to prove itself by its potentials, and a
share of the values is compared with POT's network simplex in float64.

    python benchmarks/stress_transport.py --output results/stress_transport.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ot.lp.emd_wrap import emd_c
from torch import Tensor

from emd_retrieval._files import write_text
from emd_retrieval.progress import progress_counter
from emd_retrieval.records import ResultRecord, markdown_table
from emd_retrieval.transport import simplex

GROUP = 64
"""Problems of one shape and kind that are solved together."""

LIMITS = {"value": 1e-6, "gap": 1e-6, "marginal": 1e-6, "dual": 2e-7}
"""Worst errors allowed: value, duality gap and feasibility of the potentials in units of the
costs' range (and mass), marginals in units of mass."""

Random = np.random.Generator
Array = np.ndarray


def _some_zero(random: Random, count: int) -> Array:
    weights = random.random((GROUP, count)) * (random.random((GROUP, count)) > 0.4)
    weights[np.arange(GROUP), random.integers(count, size=GROUP)] = 1.0
    return weights


def _one_hot(random: Random, count: int) -> Array:
    weights = np.full((GROUP, count), 1e-6)
    weights[np.arange(GROUP), random.integers(count, size=GROUP)] = 1.0
    return weights


WEIGHTS: dict[str, Callable[[Random, int], Array]] = {
    "relu + 1e-3": lambda r, n: np.maximum(r.standard_normal((GROUP, n)), 0) + 1e-3,
    "equal": lambda r, n: np.ones((GROUP, n)),
    "integer": lambda r, n: r.integers(1, 6, (GROUP, n)).astype(float),
    "one-hot + 1e-6": _one_hot,
    "40 % zeros": _some_zero,
    "lognormal": lambda r, n: np.exp(4 * r.standard_normal((GROUP, n))),
}


def _features(random: Random, count: int) -> Array:
    features = random.standard_normal((GROUP, count, 16)) + 0.5
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _cosine(random: Random, n: int, m: int) -> Array:
    return 1 - _features(random, n) @ _features(random, m).transpose(0, 2, 1)


def _identical(random: Random, n: int, m: int) -> Array:
    both = _features(random, max(n, m))
    return 1 - both[:, :n] @ both[:, :m].transpose(0, 2, 1)


def _duplicated(random: Random, n: int, m: int) -> Array:
    rows, columns = random.integers(n, size=n), random.integers(m, size=m)
    return _cosine(random, n, m)[:, rows][:, :, columns]


COSTS: dict[str, Callable[[Random, int, int], Array]] = {
    "cosine": _cosine,
    "uniform": lambda r, n, m: r.random((GROUP, n, m)),
    "constant": lambda r, n, m: np.full((GROUP, n, m), 0.7),
    "zero": lambda r, n, m: np.zeros((GROUP, n, m)),
    "quantised": lambda r, n, m: np.round(4 * _cosine(r, n, m)) / 4,
    "duplicated": _duplicated,
    "identical sets": _identical,
    "negative": lambda r, n, m: -2 * r.random((GROUP, n, m)),
    "SNR-like, to 1e12": lambda r, n, m: np.exp(4 * r.standard_normal((GROUP, n, m))) * 1e6,
}


def random_group(random: Random) -> tuple[str, str, Tensor, Tensor, Tensor]:
    """One group of problems: kinds of weights and costs, cost, supply and demand."""
    n, m = (1 + (64 * random.random(2) ** 2).astype(int)).tolist()
    weights, costs = random.choice(list(WEIGHTS)), random.choice(list(COSTS))
    supply, demand = WEIGHTS[weights](random, n), WEIGHTS[weights](random, m)
    # Any scale of mass; totals that agree only up to the rounding of the dtype.
    supply *= 10.0 ** random.uniform(-6, 6, (GROUP, 1))
    demand *= supply.sum(1, keepdims=True) / demand.sum(1, keepdims=True)
    dtype = torch.float32 if random.random() < 0.75 else torch.float64
    parts = (COSTS[costs](random, n, m), supply, demand)
    cost, *sides = (torch.from_numpy(part).to(dtype).contiguous() for part in parts)
    return weights, costs, cost, sides[0], sides[1]


def errors_of(
    cost: Tensor, supply: Tensor, demand: Tensor, oracle_share: float, random: Random
) -> dict[str, Tensor]:
    """Errors of the simplex on one group in the units of :data:`LIMITS`; -1 where not compared."""
    plan = simplex.solve_simplex(cost, supply, demand)
    assert plan.flow is not None
    assert plan.supply_potential is not None
    assert plan.demand_potential is not None
    exact, a, b = cost.double(), supply.double(), demand.double()
    mass = a.sum(-1)
    b = b * (mass / b.sum(-1))[:, None]
    value, flow = plan.value.double(), plan.flow.double()
    u, v = plan.supply_potential.double(), plan.demand_potential.double()

    size = exact.abs().amax((1, 2))
    unit = exact.amax((1, 2)) - exact.amin((1, 2))
    if cost.dtype == torch.float32:
        # Results in float32 hold the size of the costs to 24 bits, whatever their range.
        unit = torch.maximum(unit, size)
    unit = torch.where(unit > 0, unit, torch.where(size > 0, size, 1.0))
    reduced = exact - u[:, :, None] - v[:, None, :]
    off = (flow.sum(2) - a).abs().amax(1), (flow.sum(1) - b).abs().amax(1), -flow.amin((1, 2))
    gap = (value - (a * u).sum(1) - (b * v).sum(1)).abs()
    oracle = torch.full_like(mass, -1.0)
    for k in np.flatnonzero(random.random(len(cost)) < oracle_share):
        # POT's tolerance is absolute, and it gives up on some problems of negative costs.
        low = exact[k].min()
        weights = ((side[k] / side[k].sum()).numpy() for side in (a, b))
        unit_cost = ((exact[k] - low) / unit[k]).numpy()
        _, best, _, _, status = emd_c(*weights, unit_cost, 1_000_000, 1, None, None)
        if status == 1:
            oracle[k] = abs(float((value[k] / mass[k] - low) / unit[k]) - best)
    return {
        "value": oracle,
        "gap": gap / (unit * mass),
        "marginal": torch.stack(off).amax(0) / mass,
        "dual": reduced.amin((1, 2)).clamp(max=0).abs() / unit,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--oracle-share", type=float, default=1.0, help="share compared with POT")
    parser.add_argument("--output", type=Path, help="write the record to this markdown file")
    arguments = parser.parse_args()

    random = np.random.default_rng(arguments.seed)
    rows, start = [], time.perf_counter()
    with progress_counter("solving", total=arguments.problems, unit="problem") as bar:
        for _ in range(-(-arguments.problems // GROUP)):
            weights, costs, *problem = random_group(random)
            errors = errors_of(*problem, arguments.oracle_share, random)
            failed = torch.zeros(GROUP, dtype=torch.bool)
            for name, limit in LIMITS.items():
                failed |= ~(errors[name] <= limit)  # NaN fails
            rows.append(
                {
                    "weights": weights,
                    "costs": costs,
                    "problems": GROUP,
                    "compared": int((errors["value"] >= 0).sum()),
                    "failed": int(failed.sum()),
                    **{name: float(error.max()) for name, error in errors.items()},
                }
            )
            bar.update(GROUP)
    elapsed = time.perf_counter() - start

    counts = dict.fromkeys(("problems", "compared", "failed"), "sum")
    worst = dict.fromkeys(LIMITS, "max")
    groups = pd.DataFrame(rows)
    tables = {}
    for kind in ("weights", "costs"):
        table = groups.groupby(kind, sort=False).agg({**counts, **worst}).reset_index()
        for limited in LIMITS:
            table[limited] = table[limited].map("{:.1e}".format)
        tables[kind] = table
        print(markdown_table(table), "\n")
    total, failed = int(groups["problems"].sum()), int(groups["failed"].sum())
    told = (
        f"{total:,} problems, {int(groups['compared'].sum()):,} compared with POT in float64, "
        f"{failed} failed ({elapsed:.0f} s)"
    )
    print(told)
    if arguments.output:
        record = ResultRecord(
            name="stress_transport",
            title="Random transportation problems through the native simplex",
            tables=tables,
            settings={
                "largest errors allowed": LIMITS,
                "oracle share": arguments.oracle_share,
                "instruction set": simplex.instruction_sets()[0],
            },
            data={"problems": total, "shapes": "1x1 to 64x64", "dtypes": "float32, float64"},
            seed=arguments.seed,
            notes=(
                f"{told}.",
                "The worst error of each kind in units of the costs' range (and mass); every plan "
                "is checked by its own potentials, whether compared or not.",
                "POT's own faults (status other than optimal) are left out of the comparison.",
            ),
        )
        write_text(arguments.output, record.to_markdown())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
