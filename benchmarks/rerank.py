r"""Re-ranking a shortlist from a store: a query at 10 k to 1 M images, and what pruning saves.

Everything is included: the search of the FAISS index, reading and decoding the candidates, costs,
weights, transport, the ids of the answer. The loop of cv2.EMD is timed both ways: with all of this
(costs and weights in NumPy, one GEMM a query), and alone, on cost matrices and weights ready made,
as the batched log-Sinkhorn is. All take short turns in one run, so that a busy machine slows all of
them alike; images are drawn from a mixture, so that an inverted-file index means something.

    python benchmarks/rerank.py --features cub.store --output results/rerank_scale.md
    python benchmarks/rerank.py --sizes 10000 --queries 100

``--features`` names a store of real images with global vectors, on which pruning is measured as
well. Classes 26 to 50 of CUB-200-2011 for instance:

    find CUB_200_2011/images/0{2[6-9],[34][0-9],50}.* -name '*.jpg' | sort > cub.txt
    emd-retrieval extract --images cub.txt --store cub.store \
        --backbone tf_efficientnet_lite0 --weights tf_efficientnet_lite0.safetensors

The largest store takes 2 GB of disk while it is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import faiss
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emd_retrieval._files import write_text
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.progress import progress
from emd_retrieval.records import ResultRecord
from emd_retrieval.retrieval import EMDReranker, FaissIndexShortlist, LocalFeatureStore
from emd_retrieval.transport import solve, solve_top_k

CHUNK = 10_000
CLUSTERS, PARTS, NOISE = 1000, 4096, 0.7
SHORTLIST, K = 100, 10
READY = 8  # queries whose problems are ready made


class Mixture:
    """Images of a thousand kinds: a kind has its parts, an image its own view of them."""

    def __init__(self, nodes: int, channels: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = torch.randn(PARTS, channels, generator=self.generator)
        self.kinds = torch.randint(PARTS, (CLUSTERS, nodes), generator=self.generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Nodes [count, N, D] and global vectors [count, D] of unit norm."""
        kind = torch.randint(CLUSTERS, (count,), generator=self.generator)
        nodes = self.parts[self.kinds[kind]]
        nodes += NOISE * torch.randn(nodes.shape, generator=self.generator)
        nodes.relu_()
        return nodes, torch.nn.functional.normalize(nodes.mean(dim=1), dim=1)


def build(folder: Path, size: int, nodes: int, channels: int, codec: str, index_kind: str) -> None:
    """Write a store of a mixture's images and the index of their global vectors."""
    mixture = Mixture(nodes, channels, seed=1)
    training = Mixture(nodes, channels, seed=1).draw(min(size, 40_000))[1].numpy()
    index = faiss.index_factory(channels, index_kind, faiss.METRIC_INNER_PRODUCT)
    index.train(training)
    with LocalFeatureStore.create(
        folder / "s.store", channels=channels, nodes=nodes, codec=codec
    ) as writer:
        for start in progress(range(0, size, CHUNK), f"writing {size} images", unit="chunk"):
            drawn, pooled = mixture.draw(min(CHUNK, size - start))
            writer.append(np.arange(start, start + len(drawn)), drawn)
            index.add(pooled.numpy())
    faiss.write_index(index, str(folder / "s.index"))


def index_kind(size: int) -> str:
    """About 4 sqrt(n) lists, the least that FAISS's guide asks for."""
    return f"IVF{min(4096, 2 ** round(np.log2(4 * np.sqrt(size))))},Flat"


def milliseconds(run: Callable[[int], object], count: int) -> np.ndarray:
    """Time of each of ``count`` calls; what was garbage before does not count."""
    gc.collect()
    times = np.empty(count)
    for i in range(count):
        start = time.perf_counter()
        run(i)
        times[i] = 1e3 * (time.perf_counter() - start)
    return times


def opencv_loop(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> list[float]:
    """Distances of one problem after another."""
    return [
        cv2.EMD(supply[c][:, None], demand[c][:, None], cv2.DIST_USER, cost=cost[c])[0]
        for c in range(len(cost))
    ]


def numpy_problems(query: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, ...]:
    """Costs (Equation 2) and weights (Equation 11) of a query [N, D] against sets [C, M, D]."""
    products = (stored.reshape(-1, query.shape[1]) @ query.T).reshape(*stored.shape[:2], -1)
    squares = np.einsum("cmd,cmd->cm", stored, stored)
    own_squares = np.einsum("nd,nd->n", query, query)
    cosine = products / np.sqrt(squares)[:, :, None] / np.sqrt(own_squares)
    floor = 1e-3 * np.sqrt(own_squares.mean() * squares.mean(axis=1, keepdims=True))
    supply = np.maximum(products.mean(axis=1), 0) + floor
    demand = np.maximum(products.mean(axis=2), 0) + floor
    cost = np.ascontiguousarray((1 - cosine).transpose(0, 2, 1))
    return cost, supply / supply.sum(1, keepdims=True), demand / demand.sum(1, keepdims=True)


def side_by_side(queries: int, nprobe: int) -> pd.DataFrame:
    """100 candidates, 25 nodes, 128 channels, float16: we, cv2.EMD, log-Sinkhorn."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(folder, CHUNK, 25, 128, "float16", index_kind(CHUNK))
        store = LocalFeatureStore.open(folder / "s.store")
        shortlist = FaissIndexShortlist.read(folder / "s.index", parameters={"nprobe": nprobe})
        reranker = EMDReranker(store)
        unpruned = EMDReranker(store, prune=False)
        store.nodes()  # pages warm and held against their checksums
        nodes, pooled = Mixture(25, 128, seed=1).draw(CHUNK + queries)
        nodes, pooled = nodes[CHUNK:].clone(), pooled[CHUNK:].clone()

        def ours(i: int, by: EMDReranker = reranker) -> object:
            first = shortlist.search(pooled[i : i + 1], SHORTLIST)
            return by.rerank(nodes[i : i + 1], first.ids, k=K)

        ready = []
        first = shortlist.search(pooled[:8], SHORTLIST)
        for i in range(8):
            match = reranker.matcher.match(
                nodes[i].expand(SHORTLIST, -1, -1), store.nodes(store.rows_of(first.ids[i]))
            )
            ready.append((match.cost, match.query_weights, match.reference_weights))
        arrays = [[part.numpy() for part in problem] for problem in ready]

        def opencv(i: int) -> list[float]:
            return opencv_loop(*arrays[i % 8])

        def opencv_from_store(i: int) -> np.ndarray:
            first = shortlist.search(pooled[i : i + 1], SHORTLIST)
            stored = store.nodes(store.rows_of(first.ids[0])).numpy()
            distance = np.array(opencv_loop(*numpy_problems(nodes[i].numpy(), stored)))
            return first.ids[0][np.argsort(distance, kind="stable")[:K]]

        # What is timed must agree: the same answer, up to candidates that the codes tie.
        for i in range(8):
            best = reranker.rerank(
                nodes[i : i + 1], shortlist.search(pooled[i : i + 1], SHORTLIST).ids, k=K
            ).ids[0]
            if len(np.intersect1d(best, opencv_from_store(i))) < K - 1:
                raise RuntimeError(f"query {i}: cv2.EMD gives another answer")

        def sinkhorn(i: int) -> object:
            return solve(
                *ready[i % 8], solver="sinkhorn", epsilon=0.05, iterations=100, tolerance=0.0
            )

        def batch(_: int) -> object:
            first = shortlist.search(pooled, SHORTLIST)
            return reranker.rerank(nodes, first.ids, k=K)

        runs: dict[str, tuple[Callable[[int], object], int, int]] = {
            "this package, pruned": (ours, queries, 1),
            "this package, all solved": (lambda i: ours(i, unpruned), queries, 1),
            "this package, pruned, in one batch": (batch, 20, queries),
            "cv2.EMD loop, everything included": (opencv_from_store, 100, 1),
            "cv2.EMD loop, solving only": (opencv, 100, 1),
            "log-Sinkhorn in torch, solving only": (sinkhorn, 20, 1),
        }
        times: dict[str, list[np.ndarray]] = {name: [] for name in runs}
        rounds = 20
        for run, _, _ in runs.values():
            run(0)
        gc.freeze()  # so that looking for garbage before every turn takes no time of its own
        for _ in progress(range(rounds), "side by side", unit="round"):
            for name, (run, count, each) in runs.items():
                times[name].append(milliseconds(run, max(1, count // rounds)) / each)
        p50 = {name: float(np.median(np.concatenate(parts))) for name, parts in times.items()}
        least = {name: min(float(part.min()) for part in parts) for name, parts in times.items()}
        ours_alone, ours_batched = next(iter(runs)), list(runs)[2]
        rows = []
        for name, parts in times.items():
            every = np.concatenate(parts)
            rows.append(
                {
                    "way": name,
                    "p50 ms": p50[name],
                    "p99 ms": float(np.quantile(every, 0.99)),
                    "queries/s": 1e3 / float(every.mean()),
                    "fastest ms": least[name],
                    "times a query (p50)": p50[name] / p50[ours_alone],
                    "times a query (fastest)": least[name] / least[ours_alone],
                    "times a batch (p50)": p50[name] / p50[ours_batched],
                }
            )
        return pd.DataFrame(rows)


def resident() -> dict[str, float]:
    """Memory of this process in MiB: its own, and pages of mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {"own MiB": kib["RssAnon"] / 1024, "mapped MiB": kib["RssFile"] / 1024}


def leave_memory(folder: Path) -> None:
    """Have the system forget the files that were just written, as after a restart.

    It maps neighbours of a page that lie in its cache by the way, which would count as resident.
    """
    for file in folder.rglob("*.bin"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def measure_scale(folder: Path, size: int, queries: int, nprobe: int) -> dict[str, float]:
    """One size, in a process of its own: opening, latency, memory."""
    leave_memory(folder / "s.store")
    start = time.perf_counter()
    store = LocalFeatureStore.open(folder / "s.store")
    opening = time.perf_counter() - start
    shortlist = FaissIndexShortlist.read(folder / "s.index", parameters={"nprobe": nprobe})
    reranker = EMDReranker(store)
    mixture = Mixture(store.manifest.nodes or 0, store.manifest.channels, seed=1)
    mixture.generator.manual_seed(2)
    nodes, pooled = mixture.draw(queries)
    before = resident()
    touched: set[int] = set()
    solved = compared = 0

    def one(i: int) -> None:
        nonlocal solved, compared
        first = shortlist.search(pooled[i : i + 1], SHORTLIST)
        found = reranker.rerank(nodes[i : i + 1], first.ids, k=K)
        solved += found.solved
        compared += found.compared
        touched.update(first.ids[0].tolist())

    cold = milliseconds(one, queries)
    warm = np.concatenate([milliseconds(one, queries) for _ in range(3)])
    after = resident()
    set_bytes = (store.manifest.nodes or 0) * (store.manifest.channels + 4)
    return {
        "images": size,
        "store GB": sum(f.stat().st_size for f in (folder / "s.store").rglob("*") if f.is_file())
        / 1e9,
        "open ms": 1e3 * opening,
        "p50 ms": float(np.median(warm)),
        "p99 ms": float(np.quantile(warm, 0.99)),
        "first touch p99 ms": float(np.quantile(cold, 0.99)),
        "queries/s": 1e3 / float(warm.mean()),
        "skipped %": 100 * (1 - solved / compared),
        "rows touched": len(touched),
        "touched MiB": len(touched) * set_bytes / 2**20,
        "mapped MiB": after["mapped MiB"] - before["mapped MiB"],
        "own MiB": after["own MiB"] - before["own MiB"],
    }


@contextmanager
def built(size: int, keep: Path | None) -> Iterator[Path]:
    """A store of 14 x 128 int8 with its index; in ``keep`` it stays for the next run."""
    if keep is not None:
        folder = keep / str(size)
        if not (folder / "s.index").exists():
            folder.mkdir(parents=True, exist_ok=True)
            build(folder, size, 14, 128, "int8", index_kind(size))
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        build(Path(place), size, 14, 128, "int8", index_kind(size))
        yield Path(place)


def scale(sizes: list[int], queries: int, nprobe: int, keep: Path | None) -> pd.DataFrame:
    """A row a size, each measured in a fresh process; the last one is a projection."""
    rows = []
    for size in sizes:
        with built(size, keep) as folder:
            command = [
                sys.executable, __file__, "--measure", str(folder), "--sizes", str(size),
                "--queries", str(queries), "--nprobe", str(nprobe),
            ]  # fmt: skip
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(answer.stdout.splitlines()[-1]))
    table = pd.DataFrame(rows)
    table["images"] = table["images"].astype(int).map("{:,}".format)
    largest = rows[-1]
    if largest["images"] >= 1e6:
        factor = 1e8 / largest["images"]
        table.loc[len(table)] = {
            "images": "100,000,000 (projected)",
            "store GB": largest["store GB"] * factor,
        }
    return table


def pruning(path: Path, queries: int) -> pd.DataFrame:
    """Top-10 of 100 with and without pruning on real features, queries among themselves."""
    store = LocalFeatureStore.open(path)
    nodes, pooled, ids = store.nodes(), store.global_vectors(), np.asarray(store.ids, object)
    shortlist = FaissIndexShortlist.from_matrix(pooled, ids=ids)
    first = shortlist.search(pooled, SHORTLIST + 1).without(ids).top(SHORTLIST)
    rows_of = {name: row for row, name in enumerate(ids)}
    some = range(0, len(store), max(1, len(store) // READY))[:READY]
    candidates = torch.tensor([[rows_of[name] for name in first.ids[i]] for i in some])
    match = EMDMatcher().match(
        nodes[list(some)].unsqueeze(1).expand(-1, SHORTLIST, -1, -1), nodes[candidates]
    )
    ready = match.cost, match.query_weights, match.reference_weights

    pruned, unpruned = EMDReranker(store), EMDReranker(store, prune=False)
    runs: dict[str, Callable[[int], object]] = {
        "pruned": lambda i: pruned.rerank(nodes[i : i + 1], first.ids[i : i + 1], k=K),
        "all solved": lambda i: unpruned.rerank(nodes[i : i + 1], first.ids[i : i + 1], k=K),
        "pruned, solving only": lambda _: solve_top_k(*ready, K),
        "all solved, solving only": lambda _: solve(*ready, need_flow=False, need_potentials=False),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for query in range(min(queries, len(store))):
        runs["pruned"](query)  # or the first of them alone would fetch the candidates' bytes
        for name, run in runs.items():
            start = time.perf_counter()
            run(query)
            each = READY if "only" in name else 1
            times[name].append(1e3 * (time.perf_counter() - start) / each)
    answers = {by: by.rerank(nodes, first.ids, k=K) for by in (pruned, unpruned)}
    same = (answers[pruned].ids == answers[unpruned].ids).all() and torch.equal(
        answers[pruned].similarities, answers[unpruned].similarities
    )
    if not same:
        raise RuntimeError("pruning gives another answer than solving everything")
    p50 = {name: float(np.median(every)) for name, every in times.items()}
    fastest = {name: min(every) for name, every in times.items()}
    rows = []
    for name in runs:
        whole = name.replace("pruned", "all solved")
        answer = answers[pruned if name.startswith("pruned") else unpruned]
        rows.append(
            {
                "features": f"{path.stem} {list(nodes.shape)}",
                "way": name,
                "p50 ms": p50[name],
                "times faster (p50)": p50[whole] / p50[name],
                "times faster (fastest)": fastest[whole] / fastest[name],
                "solved %": 100 * answer.solved / answer.compared,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--nprobe", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--features", type=Path, help="a store of real images' features")
    parser.add_argument("--keep", type=Path, help="folder in which generated stores stay")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    if options.measure is not None:
        row = measure_scale(options.measure, options.sizes[0], options.queries, options.nprobe)
        print(json.dumps(row))
        return
    tables = {"100 candidates of 25 x 128, float16": side_by_side(options.queries, options.nprobe)}
    if options.features is not None:
        tables["pruning on real features"] = pruning(options.features, options.queries)
    if options.sizes:
        tables["14 x 128 int8, IVF, 100 candidates"] = scale(
            options.sizes, options.queries, options.nprobe, options.keep
        )
    record = ResultRecord(
        name="rerank_scale",
        title="Re-ranking a shortlist from a store",
        tables=tables,
        settings={
            "k": K,
            "shortlist": SHORTLIST,
            "nprobe": options.nprobe,
            "queries": options.queries,
            "threads": options.threads,
        },
        data={"kinds": CLUSTERS, "parts": PARTS, "noise": NOISE},
        seed=1,
        notes=(
            "Times of one query at a time, everything included; where it says 'solving only', "
            "costs and weights were ready made. 'times' are ratios to the two pruned searches: one "
            "query at a time, and all queries in one call.",
            "Stores are read from the disk at first touch; 'touched' are the bytes of the rows "
            "asked for. Nodes are read into buffers that are given back, 'mapped' is what the "
            "process holds of the id index.",
            "Images from a mixture of 1000 kinds with 14 or 25 parts each and noise.",
            "100 M images: the store's size follows from its layout. A query touches as many rows "
            "at any size, so that the second stage stays what it is with pages warm; the first "
            "stage is the index's (its shards search side by side), and a row that is not in "
            "memory costs one read of the disk.",
        ),
    )
    text = record.to_markdown()
    print(text)
    if options.output is not None:
        write_text(options.output, text)


if __name__ == "__main__":
    main()
