"""Let the disk run full in the middle of extract, append, train, table8 and evaluate.

Each attempt gives the command a small disk (a tmpfs, which only root can mount; otherwise a limit
on the size of files). It must end with an error that says so; what was there before and what was
finished must be whole; and with more room the same command must end as if nothing had happened.

    python benchmarks/fill_disk.py --times 20
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import shutil
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from kill_commands import (
    BACKBONE,
    Command,
    commands_in,
    differing,
)

from emd_retrieval.records import ResultRecord
from emd_retrieval.workflows import EvaluateImages, evaluate_images

COMMANDS = ("append", "extract", "train", "table8", "evaluate")
FULL = ("No space left on device", "os error 28", "File too large", "os error 27")


class NoMountError(Exception):
    """This user may not mount."""


class Disk:
    """A folder with little room, and then with more."""

    def __init__(self, folder: Path, kib: int) -> None:
        self.folder = folder
        self.kib = kib

    def limit(self) -> None:
        """Called in the process that writes."""

    def grow(self) -> None:
        """Give it all the room it wants."""


class SmallDisk(Disk):
    """A tmpfs of so many KiB."""

    def __init__(self, folder: Path, kib: int) -> None:
        super().__init__(folder, kib)
        mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder))

    def grow(self) -> None:
        mount("-o", "remount,size=1g", str(self.folder))


class SmallFiles(Disk):
    """No file may be larger than so many KiB."""

    def limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.kib * 1024, self.kib * 1024))


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoMountError(done.stderr.strip())


@contextmanager
def disk(kind: type[Disk], folder: Path, kib: int) -> Iterator[Disk]:
    folder.mkdir()
    try:
        yield kind(folder, kib)
    finally:
        if kind is SmallDisk:
            subprocess.run(["umount", str(folder)], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def evaluate_all(birds: Path, weights: Path) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        evaluate_images(
            EvaluateImages(
                data=birds,
                classes="6-8",
                backbone=BACKBONE,
                weights=weights,
                resize=48,
                crop=48,
                shortlist=None,
            ),
            folder / "out",
        )

    return run


def look_at_record(folder: Path, whole: Path) -> tuple[float, str]:
    """The record is of this run or of an earlier one, and whole."""
    file = folder / "out" / "evaluate.json"
    if not file.is_file():
        return 0, "no record"
    ResultRecord.load(file)
    return 1, "record"


def tables_of(folder: Path) -> dict[str, str]:
    """The tables but for times, and which files there are."""
    found = {file.name: "here" for file in (folder / "out").iterdir()}
    table = ResultRecord.load(folder / "out" / "evaluate.json").table
    return {**found, "table": table.to_csv()}


def run_in(run: Callable[[Path], None], place: Disk) -> str:
    """Run a command in a process of its own; returns its error, or nothing."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        place.limit()
        try:
            run(place.folder)
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        else:
            sender.send("")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    sender.close()
    try:
        said: str = receiver.recv()
    except EOFError:
        process.join()
        said = f"the process ended with {process.exitcode}"
    process.join()
    return said


def try_command(
    name: str, command: Command, kind: type[Disk], times: int, folder: Path, chance: random.Random
) -> None:
    whole = folder / f"{name}-whole"
    with tempfile.TemporaryDirectory(dir=folder) as other:
        place = Disk(Path(other), 0)
        error = run_in(command.run, place)
        assert not error, error
        shutil.copytree(other, whole)
    expected = command.content(whole)
    sizes = [file.stat().st_size for file in whole.rglob("*") if file.is_file()]
    # A tmpfs counts whole pages of 4 KiB, folders as well.
    most = (
        sum(-(-size // 4096) + 1 for size in sizes) * 4 if kind is SmallDisk else max(sizes) >> 10
    )
    full = runs = 0
    seen: Counter[str] = Counter()
    while full < times:
        runs += 1
        assert runs < 20 * times, f"{name}: the disk does not run full"
        with disk(kind, folder / f"{name}-{runs}", chance.randrange(0, most) + 1) as place:
            error = run_in(command.run, place)
            if error:
                first = error.splitlines()[0]
                assert any(word in first for word in FULL), f"{name}, {place.kib} KiB: {error}"
                full += 1
                seen[command.look(place.folder, whole)[1]] += 1
            place.grow()
            error = run_in(command.run, Disk(place.folder, 0))
            assert not error, f"{name}: with more room: {error}"
            found = command.content(place.folder)
            wrong = differing(found, expected)
            assert not wrong, f"differs from an undisturbed run: {wrong}"
    stages = ", ".join(f"{stage} {count}" for stage, count in seen.most_common())
    print(
        f"{name}: {full} times a full {'disk' if kind is SmallDisk else 'file'} ({stages}); "
        "every error said so, all that was left was whole, every end the undisturbed one",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="full disks of each command")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument(
        "--how", choices=["disk", "files"], help="(a disk where root may mount one)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        kind: type[Disk] = SmallFiles if options.how == "files" else SmallDisk
        try:
            with disk(kind, folder / "trial", 64):
                pass
        except NoMountError as error:
            if options.how == "disk":
                raise SystemExit(f"no tmpfs can be mounted here: {error}") from error
            kind = SmallFiles
        commands = commands_in(folder)
        evaluate = evaluate_all(folder / "birds", folder / "net.safetensors")
        commands["evaluate"] = Command(evaluate, look_at_record, tables_of)
        for name in options.only:
            try_command(name, commands[name], kind, options.times, folder, chance)


if __name__ == "__main__":
    main()
