"""Flip bits of, and cut off, every kind of file that is read back, and look at what is made of it.

Each attempt flips one bit at a random place, or cuts the file off at one. What is read then must be
refused with the file's name, or be what it was; where a format has no checksum over everything,
as with files of other programs, something else may be read, which is counted. Nothing may crash.

    python benchmarks/flip_bits.py --times 1000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from emd_retrieval._checksums import (
    check_checkpoint,
    load_table,
    load_tensors,
    save_table,
    save_tensors,
)
from emd_retrieval._tables import read_table
from emd_retrieval.records import ResultRecord
from emd_retrieval.retrieval import CandidateTable, FaissIndexShortlist, LocalFeatureStore
from emd_retrieval.training.model import check_recipe_file, read_summary, write_summary
from emd_retrieval.workflows.extract import read_skipped, write_skipped

COUNT, NODES, CHANNELS = 24, 3, 8
OUTCOMES = ("refused by name", "as it was", "something else", "refused without name", "crashed")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: For the table.
        file: The file that is damaged.
        read: Reads it, and gives all that it says as text.
        certain: Whatever is altered is refused; something else is never read.
    """

    name: str
    file: Path
    read: Callable[[], str]
    certain: bool = True


def text_of(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.contiguous().numpy()
        plain = value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()
        digest.update(plain)
    return digest.hexdigest()


def store_kinds(folder: Path) -> list[Kind]:
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(COUNT, NODES, CHANNELS, generator=generator)
    path = folder / "birds.store"
    names = [f"robin/{i:03d}.jpg" for i in range(COUNT)]
    with LocalFeatureStore.create(
        path, channels=CHANNELS, nodes=None, codec="int8", global_channels=CHANNELS, ids="string"
    ) as writer:
        writer.append(names[:-4], nodes[:-4], nodes[:-4].mean(dim=1))
        writer.append(names[-4:], nodes[-4:, :2], nodes[-4:].mean(dim=1))
    LocalFeatureStore.open(path).delete(names[3:5])
    wanted = [name for i, name in enumerate(names) if i not in (3, 4)]

    def look() -> str:
        store = LocalFeatureStore.open(path)
        rows = store.rows_of(wanted)
        return text_of(rows, store.nodes(rows), store.counts(rows), store.global_vectors(rows))

    def verify() -> str:
        LocalFeatureStore.open(path, verify=True)
        return "sound"

    kinds = []
    for file in [path / "store.json", path / "deleted-2.bin", *sorted(path.glob("shard-*/*"))]:
        kinds.append(Kind(f"store, read: {file.name}", file, look))
        kinds.append(Kind(f"store, verify: {file.name}", file, verify))
    write_skipped(path, {"a.png": (3, "no image"), "b.png": (7, "no image")})
    kinds.append(
        Kind("skipped.csv", path / "skipped.csv", lambda: str(read_skipped(path)), certain=False)
    )
    return kinds


def run_kinds(folder: Path) -> list[Kind]:
    generator = torch.Generator().manual_seed(0)
    run = folder / "run"
    run.mkdir()
    tensors = {name: torch.randn(16, 9, generator=generator) for name in ("embedder.w", "proxy")}
    weights, foreign = run / "model.safetensors", run / "net.safetensors"
    save_tensors(weights, tensors)
    save_file(tensors, foreign)
    (run / "recipe.yaml").write_text("data: {name: CUB-200-2011}\nmodel: {pyramid: [2, 1]}\n")
    summary = {"steps": 7, "validation": {"MAP@R": 12.5}, "weights": {"file": "a", "sha": "0" * 64}}
    write_summary(run, summary)
    checkpoint = run / "checkpoint.ckpt"
    torch.save({"state": tensors, "global_step": 8, "callbacks": {"best": 0.5}}, checkpoint)
    scores = pd.DataFrame(
        np.random.default_rng(0).random((40, 3), np.float32),
        columns=["P@1", "RP", "MAP@R"],
        index=pd.Index([f"bird {i}" for i in range(40)], name="image"),
    )
    save_table(run / "scores.parquet", scores)
    record = ResultRecord(
        name="train", title="A run", tables={"metrics": scores.reset_index()}, settings={"seed": 3},
        data={"images": 40}, seed=3,
    )  # fmt: skip
    record.save(run)

    def resumed() -> str:
        check_checkpoint(checkpoint)
        state = torch.load(checkpoint, weights_only=True)
        return text_of(*state["state"].values(), state["global_step"], state["callbacks"])

    def recipe() -> str:
        check_recipe_file(run, read_summary(run))
        return (run / "recipe.yaml").read_text()

    def loaded_record() -> str:
        return ResultRecord.load(run / "train.json").to_json()

    return [
        Kind("run: model.safetensors", weights, lambda: text_of(*load_tensors(weights).items())),
        Kind("run: checkpoint.ckpt", checkpoint, resumed),
        Kind("run: run.json", run / "run.json", lambda: json.dumps(read_summary(run))),
        Kind("run: recipe.yaml", run / "recipe.yaml", recipe),
        Kind("run: scores.parquet", run / "scores.parquet",
             lambda: load_table(run / "scores.parquet").to_csv()),
        Kind("record: train.json", run / "train.json", loaded_record),
        Kind("weights of others: .safetensors", foreign,
             lambda: text_of(*load_tensors(foreign).items()), certain=False),
    ]  # fmt: skip


def shortlist_kinds(folder: Path) -> list[Kind]:
    vectors = np.random.default_rng(0).standard_normal((200, CHANNELS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kinds = []
    for factory in ("Flat", "IDMap,Flat", "IVF4,Flat", "HNSW8", "PQ4x4", "SQ8"):
        index = faiss.index_factory(CHANNELS, factory)
        index.train(vectors)
        if "IDMap" in factory:
            index.add_with_ids(vectors, np.arange(200))
        else:
            index.add(vectors)
        file = folder / f"{factory.replace(',', '_')}.faiss"
        faiss.write_index(index, str(file))

        def search(file: Path = file) -> str:
            found = FaissIndexShortlist.read(file, name=file.name).search(vectors[:5], 4)
            return text_of(found.ids, found.scores)

        kinds.append(Kind(f"FAISS {factory}", file, search, certain=False))
    summed = folder / "summed.faiss"
    shutil.copy(folder / "Flat.faiss", summed)
    digest = hashlib.sha256(summed.read_bytes()).hexdigest()
    (folder / "summed.faiss.sha256").write_text(f"{digest}  summed.faiss\n")

    def search_summed() -> str:
        found = FaissIndexShortlist.read(summed).search(vectors[:5], 4)
        return text_of(found.ids, found.scores)

    kinds.append(Kind("FAISS Flat with .sha256", summed, search_summed))
    ids = np.random.default_rng(1).integers(0, 10**9, (30, 4))
    scores = np.random.default_rng(2).random((30, 4)).astype(np.float32)
    np.savez(folder / "c.npz", ids=ids, scores=scores)
    np.savez_compressed(folder / "z.npz", ids=ids, scores=scores)
    table = pd.DataFrame(
        {"query": np.repeat(np.arange(30), 4), "id": ids.ravel(), "score": scores.ravel()}
    )
    table.to_parquet(folder / "ours.parquet", write_page_checksum=True)
    table.to_parquet(folder / "others.parquet")
    table.to_csv(folder / "c.csv", index=False)
    for name, file, certain in (
        ("candidates .npz", "c.npz", True),
        ("candidates .npz, compressed", "z.npz", True),
        ("candidates .parquet with page checksums", "ours.parquet", False),
        ("candidates .parquet without", "others.parquet", False),
        ("candidates .csv", "c.csv", False),
    ):

        def candidates(path: Path = folder / file) -> str:
            found = CandidateTable.read(path)
            return text_of(found.queries, found.candidates.ids, found.candidates.scores)

        kinds.append(Kind(name, folder / file, candidates, certain))
    ranking = folder / "ours.parquet"
    kinds.append(Kind("ranking.parquet", ranking, lambda: read_table(ranking).to_csv(), False))
    return kinds


def attempt(kind: Kind, expected: str, warned: str) -> str:
    try:
        return OUTCOMES[1] if kind.read() == expected else OUTCOMES[2]
    except (ValueError, FileNotFoundError) as error:
        named = kind.file.name in str(error) or warned in str(error)
        return OUTCOMES[0] if named else OUTCOMES[3]


def attack(kind: Kind, times: int, seed: int, results: Connection) -> None:
    """In a process of its own, which a crash would end."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    warnings.simplefilter("ignore")
    chance = random.Random(f"{seed} {kind.name}")
    whole = kind.file.read_bytes()
    expected = kind.read()
    folder_name = kind.file.parent.name
    for number in range(times):
        if number % 4:
            bit = chance.randrange(8 * len(whole))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            what = f"bit {bit}"
        else:
            data = bytearray(whole[: chance.randrange(len(whole))])
            what = f"{len(data)} bytes"
        kind.file.write_bytes(data)
        try:
            results.send((what, attempt(kind, expected, folder_name)))
        except BaseException as error:
            results.send((what, f"crashed: {type(error).__name__}: {str(error)[:200]}"))
    kind.file.write_bytes(whole)
    results.send(None)


def outcomes(kind: Kind, times: int, seed: int) -> list[tuple[str, str]]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=attack, args=(kind, times, seed, sender)
    )
    process.start()
    sender.close()
    found: list[tuple[str, str]] = []
    try:
        while (one := receiver.recv()) is not None:
            found.append(one)
    except EOFError:
        process.join()
        found.append(("the process", f"crashed: exit code {process.exitcode}"))
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1000, help="attempts on each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a pattern: kinds whose name has it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    failed = total = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kinds = [*store_kinds(folder), *run_kinds(folder), *shortlist_kinds(folder)]
        print("| file | " + " | ".join(OUTCOMES) + " |\n| :--- |" + " ---: |" * len(OUTCOMES))
        for kind in kinds:
            if not re.search(options.only, kind.name):
                continue
            found = outcomes(kind, options.times, options.seed)
            counts = Counter(outcome.partition(":")[0] for _, outcome in found)
            total += len(found)
            print(f"| {kind.name} | " + " | ".join(str(counts[o]) for o in OUTCOMES) + " |")
            bad = [*OUTCOMES[3:], *OUTCOMES[2:3] * kind.certain]
            wrong = [pair for pair in found if pair[1].partition(":")[0] in bad]
            failed += len(wrong)
            for what, outcome in wrong[:3]:
                print(f"  {kind.file.name}, {what}: {outcome}", file=sys.stderr)
    print(f"\n{total} attempts, {failed} that must not be")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
