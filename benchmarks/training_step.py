"""What EMD adds to a training step and to an all-pairs evaluation, side by side in one process.

Rows take turns, round after round, and each one's fastest turn counts, so that a busy machine slows
all of them alike. A turn repeats a step for a twentieth of a second, as training does; what one
takes at once after the other rows have had the caches stands beside it. "raw" is the same loss on
pooled vectors of the same channels: the share of a step that is pytorch-metric-learning's own.

    python benchmarks/training_step.py --output results/training_step.md
    python benchmarks/training_step.py --threads 2 --profile
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from emd_retrieval._files import write_text
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.metric_learning import LossSettings, build_loss
from emd_retrieval.progress import progress
from emd_retrieval.records import ResultRecord, markdown_table
from emd_retrieval.transport import solve

BATCH, NODES, CHANNELS, TRUNK, CLASSES = 32, 14, 128, 1280, 100
TURN = 0.05
"""Seconds that one turn of a row takes, if a single step does not take longer."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is timed.
        target: Milliseconds that it should take on two cores, if there is a target.
        run: One turn.
    """

    name: str
    target: float | None
    run: Callable[[], object]


def structured_sets(count: int, channels: int, seed: int) -> Tensor:
    """Images of 50 kinds that share parts. Shape: [count, NODES, channels]."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(50, NODES, channels, generator=generator)
    noise = torch.randn(count, NODES, channels, generator=generator)
    return kinds[torch.arange(count) % 50] + 0.7 * noise


def step(
    name: str, miner: str | None, *, sets: bool, embedder: bool, matcher: EMDMatcher | None = None
) -> Callable[[], object]:
    """Forward, miner and backward of a loss on cached features."""
    loss = build_loss(
        LossSettings(name=name, miner=miner),
        num_classes=CLASSES,
        channels=CHANNELS,
        nodes=NODES if sets else None,
        matcher=matcher,
        generator=torch.Generator().manual_seed(0),
    )
    nodes = structured_sets(BATCH, TRUNK if embedder else CHANNELS, seed=1)
    features = nodes if sets else nodes.mean(1)
    linear: nn.Module = nn.Linear(TRUNK, CHANNELS) if embedder else nn.Identity()
    labels = torch.arange(BATCH // 4).repeat_interleave(4)
    features.requires_grad_(not embedder)

    def run() -> Tensor:
        embeddings = linear(features).flatten(1)
        # A leaf would be its own embedding, whose gradient adds up from step to step.
        value: Tensor = loss(embeddings * 1.0, labels)
        for tensor in (features, *linear.parameters(), *loss.parameters()):
            tensor.grad = None
        value.backward()
        return value

    return run


def all_pairs(images: int) -> list[Row]:
    """Costs, weights and solver of all pairs, and the solver alone on the same problems."""
    matcher = EMDMatcher()
    sets = structured_sets(images, CHANNELS, seed=2)
    gallery = matcher.prepare(sets)
    # A tenth of the pairs stands for all, so that the problems fit into memory.
    first, second = torch.triu_indices(images, images)
    first, second = first[::10], second[::10]
    matches = [
        matcher.match(sets[a], sets[b])
        for a, b in zip(first.split(10_000), second.split(10_000), strict=True)
    ]
    cost = torch.cat([match.cost for match in matches])
    supply = torch.cat([match.query_weights for match in matches])
    demand = torch.cat([match.reference_weights for match in matches])

    def alone() -> None:
        for _ in range(10):
            solve(cost, supply, demand, need_flow=False, need_potentials=False)

    name = f"all pairs of {images:,} sets"
    return [
        Row(f"{name}: solver alone", None, alone),
        Row(f"{name}: costs, weights and solver", None, lambda: matcher.all_pairs(gallery)),
    ]


def rows(images: int) -> list[Row]:
    miner = "multi_similarity"
    detached = EMDMatcher(weight_gradient=False)
    return [
        Row("MS loss and miner, raw", None, step(miner, miner, sets=False, embedder=False)),
        Row("MS loss and miner, EMD", 5, step(miner, miner, sets=True, embedder=False)),
        Row(
            "MS loss and miner, EMD, weights detached",
            None,
            step(miner, miner, sets=True, embedder=False, matcher=detached),
        ),
        Row("MS, raw, 1280-128 embedder", None, step(miner, miner, sets=False, embedder=True)),
        Row("MS, EMD, 1280-128 embedder", None, step(miner, miner, sets=True, embedder=True)),
        Row("N.Softmax, 100 classes, EMD", None, step(
            "normalized_softmax", None, sets=True, embedder=False
        )),
        Row("SoftTriple, 10 x 100 centres, raw", None, step(
            "soft_triple", None, sets=False, embedder=False
        )),
        Row("SoftTriple, 10 x 100 centres, EMD", 120, step(
            "soft_triple", None, sets=True, embedder=False
        )),
        *(all_pairs(images) if images else []),
    ]  # fmt: skip


@dataclass
class Times:
    """Milliseconds that a step of one row takes.

    Attributes:
        wall: In the fastest turn.
        cpu: The same, of the process's CPU time.
        first: The fastest first step of a turn.
    """

    wall: float = float("inf")
    cpu: float = float("inf")
    first: float = float("inf")


def fastest(work: list[Row], rounds: int) -> list[Times]:
    """The times of all rows, which take turns."""
    times = [Times() for _ in work]
    for turn in progress(range(rounds + 1), "rounds"):
        for row, best in zip(work, times, strict=True):
            start, start_cpu = time.perf_counter(), time.process_time()
            row.run()
            first = wall = time.perf_counter() - start
            steps = 1
            while wall < TURN:
                row.run()
                steps += 1
                wall = time.perf_counter() - start
            cpu = time.process_time() - start_cpu
            if turn:  # the first one warms caches and allocators up
                best.wall = min(best.wall, 1e3 * wall / steps)
                best.cpu = min(best.cpu, 1e3 * cpu / steps)
                best.first = min(best.first, 1e3 * first)
    return times


def profile(work: list[Row]) -> str:
    """Where the time of each row goes, by torch's own profiler."""
    parts = []
    for row in work:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
            row.run()
        table = record.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40
        )
        parts.append(f"{row.name}\n{table}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--images", type=int, default=1487, help="0 leaves the evaluation out")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--output", type=Path, help="write the record to this markdown file")
    arguments = parser.parse_args()
    work = rows(arguments.images)
    table = pd.DataFrame({"step": [row.name for row in work], "target": [r.target for r in work]})
    table["target"] = table["target"].map(lambda value: "" if pd.isna(value) else f"{value:g}")
    before = torch.get_num_threads()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        times = fastest(work, arguments.rounds)
        unit = f"{threads} thread{'s' * (threads > 1)}"
        table[f"ms, {unit}"] = [row.wall for row in times]
        table[f"first of a turn, {unit}"] = [row.first for row in times]
        if threads == 1:
            # Idle threads that spin count as CPU time; of one thread it tells what a busy machine's
            # wall clock does not.
            table["CPU ms, 1 thread"] = [row.cpu for row in times]
        if arguments.profile:
            print(profile(work))
    torch.set_num_threads(before)
    record = ResultRecord(
        name="training_step",
        title="Time of a training step and of an all-pairs evaluation",
        tables={"time": table},
        settings={"rounds": arguments.rounds, "dtype": "float32", "statistic": "fastest of rounds"},
        data={"batch": BATCH, "nodes": NODES, "channels": CHANNELS, "images": arguments.images},
        seed=0,
        notes=(
            "A step is forward, miner and backward on cached features, without an optimiser.",
            "Target: milliseconds on two idle cores.",
            f"A turn repeats a step for {TURN} s, as training does; the first step of a turn finds "
            "the caches full of other rows' data.",
            "The solver alone runs a tenth of the pairs ten times, their costs at hand.",
        ),
    )
    print(markdown_table(table))
    if arguments.output:
        write_text(arguments.output, record.to_markdown())


if __name__ == "__main__":
    main()
