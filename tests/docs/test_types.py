"""A type checker passes over the documented Python, the blocks that no test runs included.

A page is one module, its hidden beginnings too, with every line where the page has it: an error is
read as a place in the page.
"""

import os
import re
import subprocess
import sys

import pytest
from documented import ROOT, blocks_of, pages

OPTIONS = "# mypy: allow-untyped-defs, allow-incomplete-defs, check-untyped-defs\n"
"""Examples need not annotate their own functions; what is in them is checked all the same."""


def python_of(page):
    """The page with nothing but its Python."""
    lines = [OPTIONS]
    for block in blocks_of(page):
        if block.language == "python":
            lines += ["\n"] * (block.line - 1 - len(lines)) + block.code.splitlines(keepends=True)
    return "".join(lines)


def checked(folder, sources):
    """What mypy says of modules, under the project's own settings and with its cache."""
    for name, code in sources.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", "pyproject.toml",
         *(str(folder / f"{name}.py") for name in sources)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stderr
    return run.stdout.splitlines()


def test_the_documented_python_is_typed_as_the_package_says(tmp_path):
    pytest.importorskip("mypy", reason='mypy is not installed (pip install "emd_retrieval[test]")')
    sources = {re.sub(r"\W", "_", page): python_of(page) for page in pages()}
    sources = {name: code for name, code in sources.items() if code != OPTIONS}
    assert len(sources) > 10
    # One that is wrong: the checker sees what these modules import, and is not silent.
    sources["wrong"] = OPTIONS + "from emd_retrieval import pack\n\npack('nodes')\n"
    # The cache gives an error of an unchanged page with the folder of the run that found it.
    said = [re.sub(r"^.*/(?=\w+\.py:)", "", line) for line in checked(tmp_path, sources)]
    assert any(line.startswith("wrong.py:4: error: Argument 1") for line in said), said
    wrong = [line for line in said if not line.startswith("wrong.py")]
    assert not wrong, "\n".join(wrong)
