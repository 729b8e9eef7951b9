"""Kill writers of a store at random moments, over and over, and look at what is left.

After each kill the store must open, verify, and hold a prefix of what was written; when the run is
finished at last, its files must be the bytes of a run that nobody disturbed. Two writers are tried:
appending, and `extract` on small pictures with a small network.

    python benchmarks/stress_store.py --times 50
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.workflows import ExtractImages, extract_images

Writer = Callable[[Path], None]
SETS, NODES, CHANNELS, BATCH, SHARD = 400, 6, 16, 20, 150
BACKBONE = "test_resnet"


def sets_to_append() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(SETS, NODES, CHANNELS, generator=generator)
    return [f"bird/{i:05d}.jpg" for i in range(SETS)], nodes, nodes.mean(dim=1)


def append_all(store: Path) -> None:
    """Append what is not there yet, a commit a batch."""
    ids, nodes, pooled = sets_to_append()
    settings = {"codec": "int8", "ids": "string", "shard_rows": SHARD}
    with LocalFeatureStore.create(
        store, channels=CHANNELS, nodes=NODES, global_channels=CHANNELS, **settings
    ) as writer:
        for start in range(len(writer), SETS, BATCH):
            part = slice(start, start + BATCH)
            writer.append(ids[part], nodes[part], pooled[part])
            writer.commit()


def extract_all(images: Path, weights: Path) -> Writer:
    """Extract every image, a commit a batch."""

    def write(store: Path) -> None:
        # The default commits once a second, which is as long as this whole run.
        from emd_retrieval.workflows import extract

        extract._COMMIT_SECONDS = 0.0
        extract_images(
            ExtractImages(
                images=images,
                store=store,
                backbone=BACKBONE,
                weights=weights,
                resize=64,
                crop=64,
                batch_size=4,
                skip_errors=True,
            )
        )

    return write


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file that counts, by content."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "writer.lock"
    }


def kill_once(write: Writer, store: Path, after: float) -> bool:
    """Start a writer, kill it after some seconds; whether it was still at work."""
    process = multiprocessing.get_context("fork").Process(target=write, args=(store,))
    process.start()
    process.join(after)
    alive = process.is_alive()
    if alive and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not alive and process.exitcode != 0:
        raise SystemExit(f"the writer failed by itself, exit code {process.exitcode}")
    return alive


def check_rest(store: Path, whole: LocalFeatureStore) -> int:
    """What a killed writer left must be the beginning of the whole; returns its length."""
    if not (store / "store.json").exists():
        return 0
    left = LocalFeatureStore.open(store, verify=True)
    ids = list(left.ids)
    assert ids == list(whole.ids)[: len(ids)], "ids are no prefix"
    rows = range(len(ids))
    assert torch.equal(left.nodes(rows), whole.nodes(rows)), "nodes differ"
    assert torch.equal(left.global_vectors(rows), whole.global_vectors(rows)), "vectors differ"
    assert left.rows_of(ids).tolist() == list(rows), "ids are not found where they are"
    return len(ids)


def stress(name: str, write: Writer, times: int, folder: Path, chance: random.Random) -> None:
    whole_path = folder / f"{name}-whole.store"
    kill_once(write, whole_path, 600)
    start = time.monotonic()
    kill_once(write, folder / f"{name}-timed.store", 600)
    took = time.monotonic() - start
    whole = LocalFeatureStore.open(whole_path, verify=True)
    expected = fingerprint(whole_path)
    killed = runs = 0
    while killed < times:
        store = folder / f"{name}-{runs}.store"
        runs += 1
        lengths = []
        left = took
        while killed < times and kill_once(write, store, chance.uniform(0, left)):
            killed += 1
            lengths.append(check_rest(store, whole))
            left = took * (1 - lengths[-1] / len(whole))
            assert lengths == sorted(lengths), f"a store shrank: {lengths}"
        kill_once(write, store, 600)
        found = fingerprint(store)
        differ = [x for x in {*found, *expected} if found.get(x) != expected.get(x)]
        assert not differ, f"resumed bytes differ from an undisturbed run's: {differ}"
        shutil.rmtree(store)
    print(f"{name}: {killed} kills in {runs} stores; every rest a verified prefix, same bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="kills of each writer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        images = folder / "images"
        images.mkdir()
        for number in range(40):
            file = images / f"{number:02d}.png"
            if number % 9 == 3:
                file.write_bytes(b"no image")
            else:
                Image.effect_noise((64, 64), 20 + number).save(file)
        torch.manual_seed(0)
        weights = folder / "net.safetensors"
        state = timm.create_model(BACKBONE, pretrained=False).state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, weights)
        stress("append", append_all, options.times, folder, chance)
        stress("extract", extract_all(images, weights), options.times, folder, chance)


if __name__ == "__main__":
    main()
