"""The README's own Python runs here; its shell commands run in CI, in new environments."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def block(name):
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"<!-- ci: {name} -->\s*```\w+\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md has no block marked ci: {name}"
    return found.group(1)


@pytest.mark.parametrize("name", ["python", "pml", "rerank"])
def test_python_blocks_run(name, tmp_path):
    script = tmp_path / f"{name}.py"
    script.write_text(block(name), encoding="utf-8")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout


@pytest.mark.parametrize("name", ["install", "demo", "test-install", "test"])
def test_blocks_that_ci_runs_are_there(name):
    assert block(name).strip()


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|TIME)\b", README.read_text(encoding="utf-8"))


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (README.parent / link).exists(), link
