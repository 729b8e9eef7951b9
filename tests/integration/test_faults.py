"""Bounded forms of the scripts behind docs/reliability.md: kills, full disks, damaged files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_commands_killed_at_random_moments(tmp_path):
    said = run_script("kill_commands", "--times", "3", "--folder", str(tmp_path))
    assert re.findall(r"^(\w+): 3 kills", said, re.M) == ["append", "extract", "train", "table8"]


@pytest.mark.slow
def test_a_disk_runs_full_in_the_middle(tmp_path):
    said = run_script("fill_disk", "--times", "2", "--folder", str(tmp_path))
    assert re.findall(r"^(\w+): 2 times a full (?:disk|file)", said, re.M) == [
        "append", "extract", "train", "table8", "evaluate"
    ]  # fmt: skip


@pytest.mark.slow
def test_flipped_bits_and_cut_off_files():
    said = run_script("flip_bits", "--times", "40")
    attempts, wrong = re.findall(r"^(\d+) attempts, (\d+) that must not be$", said, re.M)[0]
    assert int(attempts) >= 1000
    assert wrong == "0"
