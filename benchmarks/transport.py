"""Time per transportation problem of every solver, side by side in one run.

Structured problems: two images that see the same parts, cosine costs, cross-reference weights. The
solvers take turns, round after round, and each one's fastest turn counts, so that a busy machine
slows all of them alike. OpenCV and POT solve one problem a call, so two threads of theirs are two
Python threads with half of the problems each; the others split their batch themselves.

    python benchmarks/transport.py --output results/transport.md
    python benchmarks/transport.py --sizes 25 14x25 --solvers opencv "POT emd_c" simplex
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import ot
import pandas as pd
import torch
from ot.lp.emd_wrap import emd_c
from torch import Tensor

from emd_retrieval.progress import progress
from emd_retrieval.records import ResultRecord, markdown_table
from emd_retrieval.transport import simplex, solve

SIZES = ("9", "14", "16", "25", "49", "64", "14x25")
PARTS, CHANNELS, NOISE = 6, 64, 0.7
TURN = 0.01
"""Seconds that one turn of a solver should take, within its number of problems."""
MOST_PROBLEMS = 2048

Problems = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], object]
"""Solves all of its problems and returns their values, at least where asked for the first time."""


def structured_problems(count: int, N: int, M: int, seed: int) -> Problems:
    """Pairs of images that see the same parts. Shapes: [B, N, M], [B, N], [B, M]."""
    generator = torch.Generator().manual_seed(seed)

    def side(nodes: int) -> Tensor:
        part = torch.randint(PARTS, (count, nodes, 1), generator=generator)
        seen = parts.gather(1, part.expand(-1, -1, CHANNELS))
        return (seen + NOISE * torch.randn(seen.shape, generator=generator)).relu()

    parts = torch.randn(count, PARTS, CHANNELS, generator=generator)
    query, reference = side(N), side(M)
    supply = (query @ reference.mean(1, keepdim=True).mT).squeeze(2).relu() + 1e-3  # Equation 11
    demand = (reference @ query.mean(1, keepdim=True).mT).squeeze(2).relu() + 1e-3
    demand = demand * (supply.sum(1, keepdim=True) / demand.sum(1, keepdim=True))
    unit_query = torch.nn.functional.normalize(query, dim=-1)
    unit_reference = torch.nn.functional.normalize(reference, dim=-1)
    return (1 - unit_query @ unit_reference.mT).contiguous(), supply, demand


def one_by_one(
    prepare: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[object, ...]],
    value: Callable[..., float],
) -> Callable[[Problems, int], Run]:
    """A solver of one problem a call, its arguments prepared beforehand."""

    def bind(problems: Problems, threads: int) -> Run:
        arguments = [
            prepare(*(part.numpy() for part in one)) for one in zip(*problems, strict=True)
        ]
        halves = [arguments[t::threads] for t in range(threads)]

        def values(half: list[tuple[object, ...]]) -> list[float]:
            return [value(*one) for one in half]

        def run() -> Tensor:
            if threads == 1:
                return torch.tensor(values(arguments))
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(values, halves))
            ordered = torch.empty(len(arguments))
            for t, part in enumerate(parts):
                ordered[t::threads] = torch.tensor(part)
            return ordered

        return run

    return bind


def batched(value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problems, int], Run]:
    """A solver of whole batches that follows torch's number of threads."""

    def bind(problems: Problems, threads: int) -> Run:
        def run() -> Tensor:
            torch.set_num_threads(threads)
            return value(*problems)

        return run

    return bind


def for_opencv(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> tuple[object, ...]:
    return supply[:, None].copy(), demand[:, None].copy(), cv2.DIST_USER, cost


def for_pot(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> tuple[object, ...]:
    a, b, exact = (part.astype(np.float64) for part in (supply, demand, cost))
    return a / a.sum(), b / b.sum(), exact, a.sum()


def by_opencv(supply: np.ndarray, demand: np.ndarray, kind: int, cost: np.ndarray) -> float:
    return float(cv2.EMD(supply, demand, kind, cost=cost)[0] * supply.sum())


def by_emd2(a: np.ndarray, b: np.ndarray, cost: np.ndarray, mass: float) -> float:
    return float(ot.emd2(a, b, cost) * mass)


def by_emd_c(a: np.ndarray, b: np.ndarray, cost: np.ndarray, mass: float) -> float:
    return float(emd_c(a, b, cost, 100_000, 1, None, None)[1] * mass)


def by_simplex(instruction_set: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda *p: simplex.solve_simplex(*p, instruction_set=instruction_set).value


def solvers() -> dict[str, Callable[[Problems, int], Run]]:
    """Every solver of this installation by name."""
    table = {
        "opencv": one_by_one(for_opencv, by_opencv),
        "POT emd2": one_by_one(for_pot, by_emd2),
        "POT emd_c": one_by_one(for_pot, by_emd_c),
        "sinkhorn": batched(lambda *p: solve(*p, solver="sinkhorn", need_potentials=False).value),
        "qp": batched(lambda *p: solve(*p, solver="qp", need_potentials=False).value),
    }
    if importlib.util.find_spec("qpth"):
        from table6 import qpth_value

        table["qpth"] = batched(lambda *p: qpth_value(*p).float())
    for name in simplex.instruction_sets():
        table[f"simplex {name}"] = batched(by_simplex(name))
    table["simplex, value only"] = batched(
        lambda *p: simplex.solve_simplex(*p, need_flow=False, need_potentials=False).value
    )
    return table


def fitting_count(bind: Callable[[Problems, int], Run], problems: Problems, longest: float) -> int:
    """How many problems make a turn of about :data:`TURN` seconds; 0 if one takes too long."""
    count = 1
    while True:
        run = bind(tuple(part[:count] for part in problems), 1)  # type: ignore[arg-type]
        run()
        seconds = timed(run)
        if count == 1 and seconds > longest:
            return 0
        if seconds > TURN / 4 or count == len(problems[0]):
            return max(1, min(len(problems[0]), int(count * TURN / seconds)))
        count = min(len(problems[0]), 4 * count)


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(size: str, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows of the table for problems of one size."""
    N, M = (int(n) for n in (size.split("x") * 2)[:2])
    problems = structured_problems(MOST_PROBLEMS, N, M, arguments.seed)
    exact = simplex.solve_simplex(*problems).value
    chosen = {
        name: bind
        for name, bind in solvers().items()
        if not arguments.solvers or any(name.startswith(wanted) for wanted in arguments.solvers)
    }
    counts = {
        name: fitting_count(bind, problems, arguments.longest) for name, bind in chosen.items()
    }
    runs: dict[tuple[str, int], Run] = {}
    for name, count in counts.items():
        for threads in arguments.threads if count else ():
            # Two threads need a batch worth splitting, whatever the count of one.
            some = tuple(part[: max(count, threads)] for part in problems)
            runs[name, threads] = chosen[name](some, threads)  # type: ignore[arg-type]
    fastest = dict.fromkeys(runs, float("inf"))
    failed = set()
    for _ in range(arguments.rounds):
        for (name, threads), run in runs.items():
            if name in failed:
                continue
            try:
                fastest[name, threads] = min(fastest[name, threads], timed(run))
            except RuntimeError as failure:
                if name != "qpth":
                    raise
                # It fails at some sizes, inside torch's lu_solve, with some releases of torch.
                print(f"{size}: {name} left out, it failed: {failure}", file=sys.stderr)
                failed.add(name)
    for name, count in counts.items():
        if not count or name in failed:
            continue
        value = runs[name, arguments.threads[0]]()
        assert isinstance(value, Tensor)
        row: dict[str, object] = {"size": f"{N}x{M}", "solver": name}
        for threads in arguments.threads:
            told = "1 thread" if threads == 1 else f"{threads} threads"
            row[f"us, {told}"] = fastest[name, threads] / max(count, threads) * 1e6
        error = ((value - exact[: len(value)]) / exact[: len(value)]).abs().max()
        row["value error"] = f"{float(error):.0e}"
        yield row


def with_ratios(table: pd.DataFrame, threads: list[int]) -> pd.DataFrame:
    """The table with how many times slower than each solver OpenCV and POT were in this run."""
    first = next(column for column in table.columns if column.startswith("us"))
    for rival in ("opencv", "POT emd_c"):
        theirs = table[table["solver"] == rival].set_index("size")[first]
        if len(theirs):
            table[f"{rival} / it"] = table["size"].map(theirs) / table[first]
    if len(threads) > 1:
        last = [column for column in table.columns if column.startswith("us")][-1]
        table[f"{threads[0]} / {threads[-1]} threads"] = table[first] / table[last]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="N or NxM")
    parser.add_argument("--solvers", nargs="+", help="only solvers whose names start with these")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--longest", type=float, default=2.0, help="leave out what takes longer (s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="write the record (.md, .json, .csv) to this name"
    )
    arguments = parser.parse_args()
    cv2.setNumThreads(1)

    rows = [row for size in progress(arguments.sizes, "timing") for row in measure(size, arguments)]
    table = with_ratios(pd.DataFrame(rows), arguments.threads)
    record = ResultRecord(
        name=arguments.output.stem if arguments.output else "transport",
        title="Time per transportation problem",
        tables={"time": table},
        settings={"rounds": arguments.rounds, "dtype": "float32", "statistic": "fastest of rounds"},
        data={"parts": PARTS, "channels": CHANNELS, "noise": NOISE},
        seed=arguments.seed,
        notes=(
            "The simplex returns flow and potentials, except where it says value only.",
            "POT and OpenCV are timed from their own array types, conversion left out.",
            "Value error: largest relative difference from the simplex in this run's problems.",
        ),
    )
    print(markdown_table(table))
    if arguments.output:
        record.save(arguments.output.parent)


if __name__ == "__main__":
    main()
