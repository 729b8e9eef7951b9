"""Soak: an hour's queries of the re-ranker, or thousands of training steps, without a leak.

Memory, open files, threads and time are looked at all along; the first fifth warms up. The last
line is the verdict, and the exit code is 1 where something grew: the process's own memory by more
than 8 MiB, open files or threads at all, the CPU time of a turn by more than a quarter.

    python benchmarks/soak.py rerank --queries 360000 --minutes 8
    python benchmarks/soak.py train --steps 20000 --minutes 8
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from emd_retrieval.metric_learning import LossSettings, build_loss
from emd_retrieval.progress import progress
from emd_retrieval.records import markdown_table
from emd_retrieval.retrieval import EMDReranker, FaissIndexShortlist, LocalFeatureStore

WINDOWS = 50
MOST_GROWTH_MIB = 8.0
MOST_SLOWING = 1.25


@dataclass(frozen=True)
class Window:
    """What the process was after a share of the turns; times are a turn's."""

    turns: int
    own_mib: float
    files: int
    threads: int
    p50_ms: float
    p99_ms: float
    cpu_ms: float


def look(turns: int, times: np.ndarray, cpu: float) -> Window:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return Window(
        turns,
        int(status["RssAnon"].split()[0]) / 1024,
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        int(status["Threads"]),
        1e3 * float(np.median(times)),
        1e3 * float(np.quantile(times, 0.99)),
        1e3 * cpu / len(times),
    )


def soak(turn: Callable[[int], object], turns: int, minutes: float, name: str) -> list[Window]:
    """Take turns, in windows of equal length; time alone ends them early."""
    each = max(1, turns // WINDOWS)
    end = time.monotonic() + 60 * minutes
    windows: list[Window] = []
    times = np.empty(each)
    for window in progress(range(WINDOWS), name, unit="window"):
        cpu = time.process_time()
        for i in range(each):
            start = time.perf_counter()
            turn(window * each + i)
            times[i] = time.perf_counter() - start
        windows.append(look((window + 1) * each, times, time.process_time() - cpu))
        if time.monotonic() > end:
            break
    return windows


def verdict(windows: list[Window]) -> list[str]:
    """What grew from the first fifth after the warm-up to the last; nothing is the aim."""
    if len(windows) < 10:
        return [f"only {len(windows)} of {WINDOWS} windows fit into the time: no verdict"]
    fifth = len(windows) // 5
    first, last = windows[fifth : 2 * fifth], windows[-fifth:]
    grown = []
    before, after = max(w.own_mib for w in first), max(w.own_mib for w in last)
    if after > before + MOST_GROWTH_MIB:
        grown.append(f"memory grew from {before:.1f} to {after:.1f} MiB")
    for what in ("files", "threads"):
        before, after = (max(getattr(w, what) for w in part) for part in (first, last))
        if after > before:
            grown.append(f"{what} grew from {before} to {after}")
    before, after = (float(np.median([w.cpu_ms for w in part])) for part in (first, last))
    if after > MOST_SLOWING * before:
        grown.append(f"a turn's CPU time grew from {before:.3f} to {after:.3f} ms")
    return grown


def reranker(folder: Path, images: int) -> Callable[[int], object]:
    """Queries of every kind: alone and in batches, mixed scores, flows, mistakes, refreshes."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(500, 14, 128, generator=generator)

    def draw(count: int) -> torch.Tensor:
        kind = torch.randint(500, (count,), generator=generator)
        return (kinds[kind] + 0.7 * torch.randn(count, 14, 128, generator=generator)).relu()

    path, pooled = folder / "soak.store", []
    with LocalFeatureStore.create(path, channels=128, nodes=14, codec="float16") as writer:
        for start in range(0, images, 5000):
            sets = draw(min(5000, images - start))
            writer.append(np.arange(start, start + len(sets)), sets)
            pooled.append(sets.mean(dim=1))
    store = LocalFeatureStore.open(path)
    shortlist = FaissIndexShortlist.from_matrix(torch.cat(pooled))
    by = EMDReranker(store)
    queries = draw(2000)
    vectors = queries.mean(dim=1)
    found = shortlist.search(vectors, 100)
    kept: list[np.ndarray] = []

    def turn(i: int) -> None:
        at = i % len(queries)
        if i % 10_000 == 9_999:
            # The rows' marks of having been checked go with the old view; each is read anew.
            store.refresh()
        elif i % 100 == 99:
            try:
                by.rerank(queries[at : at + 1], [[images]], k=1)
            except ValueError:
                return
            raise RuntimeError("an id that is not there was found")
        elif i % 50 == 49:
            part = slice(max(0, at - 8), at)
            by.rerank(queries[part], found.ids[part], found.scores[part], k=10, alpha=0.7)
        elif i % 50 == 48:
            by.rerank(queries[at : at + 1], found.ids[at : at + 1], k=3, return_flows=True)
        else:
            first = shortlist.search(vectors[at : at + 1], 100)
            answer = by.rerank(queries[at : at + 1], first.ids, k=10).ids.numpy()
            if i < len(queries):
                kept.append(answer) if at == 0 else None
            elif at == 0 and not np.array_equal(answer, kept[0]):
                raise RuntimeError(f"query 0 has another answer at turn {i}")

    return turn


def training() -> Callable[[int], object]:
    """Steps of the MS loss with its miner under EMD, on features drawn anew."""
    generator = torch.Generator().manual_seed(0)
    loss = build_loss(
        LossSettings(name="multi_similarity", miner="multi_similarity"),
        num_classes=100,
        channels=128,
        nodes=14,
        matcher=None,
        generator=generator,
    )
    embedder = nn.Linear(256, 128)
    optimizer = torch.optim.Adam(embedder.parameters(), lr=1e-4)
    kinds = torch.randn(100, 14, 256, generator=generator)

    def step(_: int) -> None:
        labels = torch.randint(100, (8,), generator=generator).repeat_interleave(4)
        noise = torch.randn(len(labels), 14, 256, generator=generator)
        optimizer.zero_grad()
        value = loss(embedder(kinds[labels] + 0.7 * noise).flatten(1), labels)
        value.backward()
        optimizer.step()
        if not bool(torch.isfinite(value)):
            raise RuntimeError(f"the loss became {float(value)}")

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["rerank", "train"])
    parser.add_argument("--queries", type=int, default=360_000, help="an hour at 100 a second")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=8, help="stop after the window then")
    parser.add_argument("--images", type=int, default=20_000, help="in the store")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        if options.what == "rerank":
            turn, turns = reranker(Path(place), options.images), options.queries
        else:
            turn, turns = training(), options.steps
        windows = soak(turn, turns, options.minutes, options.what)
    table = pd.DataFrame(windows)
    print(markdown_table(table.iloc[:: max(1, len(table) // 10)].round(3)))
    grown = verdict(windows)
    done = f"{windows[-1].turns} turns"
    print(f"FAILED after {done}: {'; '.join(grown)}" if grown else f"flat over {done}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
