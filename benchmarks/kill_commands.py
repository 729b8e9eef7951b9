"""Kill extract, append, train and table8 at random moments, and look at what is left each time.

Whatever is there after a kill must be whole and right: a store opens, verifies and holds a prefix
of what was written, a finished file has the bytes or numbers of an undisturbed run, and no progress
seen before is lost. At last the command is run to its end: stores must have the same bytes, and
runs the same files with the same numbers, as if nobody had disturbed them.

    python benchmarks/kill_commands.py --times 50
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from emd_retrieval.records import ResultRecord
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.training.monitor import read_log
from emd_retrieval.workflows import (
    ExtractImages,
    Machine,
    Table8,
    TrainRecipe,
    extract,
    extract_images,
    run_table8,
    train_recipe,
)

COMMANDS = ("append", "extract", "train", "table8")
BACKBONE = "test_resnet"
SETS, NODES, CHANNELS, BATCH, SHARD = 400, 6, 16, 20, 150
RECIPE = """
data: {name: CUB-200-2011, classes_train: 1-5, classes_test: 6-8}
model:
  backbone: test_resnet
  weights: random
  method: fcn
  pyramid: [2, 1]
  embedding_size: 8
  frozen_trunk: true
views: {resize: 36, crop: 32, cached: 2}
optimization:
  {optimizer: adamw, learning_rate: 0.01, batch_size: 4, images_per_class: 2, steps: 12}
validation: {folds: 2, every: 2, patience: 9}
"""


@dataclass(frozen=True)
class Command:
    """Something that is killed.

    Attributes:
        run: Works in a folder, from nothing or from what a killed run left, until it is done.
        look: Checks what a killed run left against an undisturbed one's folder; says how far it
            had come, as a number that never falls and a word.
        content: Of a finished folder, what must be the same, by name.
    """

    run: Callable[[Path], None]
    look: Callable[[Path, Path], tuple[float, str]]
    content: Callable[[Path], dict[str, str]]


# Stores.


def append_all(folder: Path) -> None:
    """Append what is not there yet, a commit a batch."""
    generator = torch.Generator().manual_seed(0)
    ids = [f"bird/{i:05d}.jpg" for i in range(SETS)]
    nodes = torch.randn(SETS, NODES, CHANNELS, generator=generator)
    with LocalFeatureStore.create(
        folder / "birds.store", channels=CHANNELS, nodes=NODES, codec="int8",
        global_channels=CHANNELS, ids="string", shard_rows=SHARD,
    ) as writer:  # fmt: skip
        for start in range(len(writer), SETS, BATCH):
            part = slice(start, start + BATCH)
            writer.append(ids[part], nodes[part], nodes[part].mean(dim=1))
            writer.commit()


def extract_all(images: Path, weights: Path) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        # The default commits once a second, which is as long as this whole run.
        extract._COMMIT_SECONDS = 0.0
        extract_images(
            ExtractImages(
                images=images,
                store=folder / "birds.store",
                backbone=BACKBONE,
                weights=weights,
                resize=64,
                crop=64,
                batch_size=4,
                skip_errors=True,
            )
        )

    return run


def look_at_store(folder: Path, whole: Path) -> tuple[float, str]:
    path = folder / "birds.store"
    if not (path / "store.json").exists():
        return 0, "no store yet"
    count = check_prefix(path, whole / "birds.store")
    complete = LocalFeatureStore.open(path).manifest.complete
    return count, "complete" if complete else "some sets" if count else "an empty store"


def check_prefix(path: Path, whole_path: Path) -> int:
    """What a killed writer left must be the beginning of the whole; returns its length."""
    left = LocalFeatureStore.open(path, verify=True)
    whole = LocalFeatureStore.open(whole_path)
    ids = left.ids
    count = len(ids)
    assert list(ids) == list(whole.ids)[:count], "ids are no prefix"
    rows = range(count)
    assert torch.equal(left.nodes(rows), whole.nodes(rows)), "nodes differ"
    assert torch.equal(left.global_vectors(rows), whole.global_vectors(rows)), "vectors differ"
    assert left.rows_of(ids).tolist() == list(rows), "ids are not found where they are"
    return count


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file that counts, by its bytes."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "writer.lock"
    }


# Runs.


def train_all(recipes: Path, data: Path) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        train_recipe(
            TrainRecipe(
                recipe=recipes / "contrastive.yaml",
                run=folder / "run",
                data=data,
                machine=Machine(cache=folder / "cache"),
            )
        )

    return run


def table8_all(recipes: Path, data: Path) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        _, failures = run_table8(
            Table8(
                recipes=recipes,
                runs=folder / "runs",
                data=data,
                methods=("raw", "fcn"),
                controls=("evaluation",),
                seeds=1,
                overrides=("optimization.steps=4",),
                machine=Machine(cache=folder / "cache"),
            ),
            folder / "out",
        )
        assert not failures, failures

    return run


def look_at_runs(folder: Path, whole: Path) -> tuple[float, str]:
    """Caches are prefixes; checkpoints load; what finished has the numbers of the whole."""
    progress = 0.0
    furthest = "nothing yet"
    for path in sorted(folder.glob("cache/*")):
        if (path / "store.json").is_file():
            progress += check_prefix(path, whole / path.relative_to(folder)) / 1e6
            furthest = "trunk features"
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or "cache" in file.relative_to(folder).parts:
            continue
        if file.name == "checkpoint.ckpt":
            step = torch.load(file, weights_only=True)["global_step"]
            # A finished run removes its checkpoint.
            progress += 0 if (file.parent / "run.json").is_file() else step
            furthest = max(furthest, "training", key=STAGES.index)
        elif file.name == "best.safetensors":
            load_file(file)
        elif file.name in READERS:
            same = content_of(file) == content_of(whole / file.relative_to(folder))
            # While it is being trained, a log is the beginning of the whole's.
            assert same or file.name == "log.csv", f"{file.relative_to(folder)} differs"
            if file.name in FINISHED:
                progress += 1000
                furthest = max(furthest, FINISHED[file.name], key=STAGES.index)
    return progress, furthest


STAGES = ("nothing yet", "trunk features", "training", "trained", "scored", "written down")
FINISHED = {
    "run.json": "trained",
    "scores.parquet": "scored",
    "train.json": "written down",
    "table8.json": "written down",
}


def summary_of(file: Path) -> object:
    return {
        name: value
        for name, value in json.loads(file.read_text(encoding="utf-8")).items()
        if name not in ("seconds", "sha256")
    }


def record_of(file: Path) -> object:
    tables = {name: table.to_dict("list") for name, table in ResultRecord.load(file).tables.items()}
    # How long each cell trained is no number of its result.
    tables.get("runs", {}).pop("seconds", None)
    return tables


def log_of(file: Path) -> object:
    return [{**row, "seconds": ""} for row in read_log(file.parent)]


def bytes_as_they_are(file: Path) -> object:
    return hashlib.sha256(file.read_bytes()).hexdigest()


READERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": bytes_as_they_are,
    "recipe.yaml": bytes_as_they_are,
    "scores.parquet": lambda file: pd.read_parquet(file).to_dict("list"),
    "run.json": summary_of,
    "train.json": record_of,
    "table8.json": record_of,
    "log.csv": log_of,
    "train.csv": bytes_as_they_are,
    "table8.csv": bytes_as_they_are,
}
"""How the files of runs are compared; time and place of a run are no part of its result."""


def content_of(file: Path) -> str:
    """As text, in which what is not a number equals itself."""
    return str(READERS[file.name](file))


def numbers_of(folder: Path) -> dict[str, str]:
    """Every file by name, those with numbers by content; stores by their bytes."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file() or file.name == "writer.lock" or "tensorboard" in name:
            continue
        found[name] = "here"
        if name.startswith("cache"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name in READERS:
            found[name] = content_of(file)
    return found


# Killing.


def run_and_kill(run: Callable[[Path], None], folder: Path, after: float) -> bool:
    """Start a command, kill it after some seconds; whether it was still at work."""
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run, args=(folder,))
    process.start()
    process.join(after)
    alive = process.is_alive()
    if alive and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not alive and process.exitcode != 0:
        raise SystemExit(f"the command failed by itself, exit code {process.exitcode}")
    return alive


def try_command(
    name: str, command: Command, times: int, folder: Path, chance: random.Random
) -> None:
    """Kill a command so many times, and finish each disturbed run."""
    whole = folder / f"{name}-whole"
    run_and_kill(command.run, whole, 600)
    timed = folder / f"{name}-timed"
    start = time.monotonic()
    run_and_kill(command.run, timed, 600)
    took = time.monotonic() - start
    expected = command.content(whole)
    found = command.content(timed)
    assert found == expected, f"two undisturbed runs differ: {differing(found, expected)}"
    shutil.rmtree(timed)
    killed = runs = late = 0
    seen: Counter[str] = Counter()
    while killed < times:
        here = folder / f"{name}-{runs}"
        runs += 1
        reached = [0.0]
        # Each run is killed up to five times, so that it comes to its end now and then.
        for _ in range(min(5, times - killed)):
            if not run_and_kill(command.run, here, chance.uniform(0, took)):
                late += 1
                break
            killed += 1
            progress, stage = command.look(here, whole)
            seen[stage] += 1
            assert progress >= reached[-1], f"went back from {reached[-1]} to {progress}"
            reached.append(progress)
        run_and_kill(command.run, here, 600)
        found = command.content(here)
        wrong = differing(found, expected)
        shown = {x: (found.get(x), expected.get(x)) for x in wrong[:1]}
        assert not wrong, f"differs from an undisturbed run: {wrong}, {shown}"
        shutil.rmtree(here)
    stages = ", ".join(f"{stage} {count}" for stage, count in seen.most_common())
    print(
        f"{name}: {killed} kills in {runs} runs of {took:.1f} s ({stages}; {late} came too late); "
        f"all that was left was whole, every end the undisturbed one",
        flush=True,
    )


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(x for x in {*found, *expected} if found.get(x) != expected.get(x))


# Data.


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(40):
        file = folder / f"{number:02d}.png"
        if number % 9 == 3:
            file.write_bytes(b"no image")
        else:
            Image.effect_noise((64, 64), 20 + number).save(file)
    return folder


def write_weights(file: Path) -> Path:
    torch.manual_seed(0)
    state = timm.create_model(BACKBONE, pretrained=False).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return file


def write_birds(root: Path) -> Path:
    """The layout of CUB-200-2011: eight classes of four pictures, each a colour with noise."""
    generator = np.random.default_rng(0)
    lines: dict[str, list[str]] = {"classes": [], "images": [], "image_class_labels": []}
    for number in range(1, 9):
        name = f"{number:03d}.Bird_{number}"
        lines["classes"].append(f"{number} {name}")
        (root / "images" / name).mkdir(parents=True)
        colour = generator.uniform(40, 215, 3)
        for i in range(4):
            image = len(lines["images"]) + 1
            lines["images"].append(f"{image} {name}/{i}.png")
            lines["image_class_labels"].append(f"{image} {number}")
            pixels = (colour + generator.normal(0, 20, (40, 40, 3))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name / f"{i}.png")
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n", encoding="utf-8")
    return root


def write_recipes(folder: Path) -> Path:
    folder.mkdir()
    (folder / "base.yaml").write_text(RECIPE)
    for loss in ("contrastive", "normalized_softmax"):
        (folder / f"{loss}.yaml").write_text(f"base: base.yaml\nloss: {{name: {loss}}}\n")
    return folder


def commands_in(folder: Path) -> dict[str, Command]:
    """The commands by name, over small inputs that are written into a folder."""
    pictures = write_pictures(folder / "pictures")
    weights = write_weights(folder / "net.safetensors")
    birds, recipes = write_birds(folder / "birds"), write_recipes(folder / "recipes")
    return {
        "append": Command(append_all, look_at_store, bytes_of),
        "extract": Command(extract_all(pictures, weights), look_at_store, bytes_of),
        "train": Command(train_all(recipes, birds), look_at_runs, numbers_of),
        "table8": Command(table8_all(recipes, birds), look_at_runs, numbers_of),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="kills of each command")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        commands = commands_in(folder)
        for name in options.only:
            try_command(name, commands[name], options.times, folder, chance)


if __name__ == "__main__":
    main()
