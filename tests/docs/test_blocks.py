"""Every code block of README.md and docs/: it runs, or it says why not and its options are right.

A page's blocks run in order, as a reader goes through them: Python in one session, commands and
Python in one folder, which holds small data under the names that the pages use.
"""

import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import yaml
from documented import LANGUAGES, ROOT, all_blocks, blocks_in, blocks_of, pages

from emd_retrieval.cli.main import build_parser, main

NOT_RUN = {
    "docs/how-to/gpu.md": {"needs a CUDA GPU": 2},
    "docs/how-to/many_machines.md": {
        "torchrun starts processes of its own, in which the test's small network is not": 1,
        "needs two GPUs": 1,
        "24 cells of three seeds; a GPU for days": 1,
    },
    "docs/how-to/table8.md": {
        "24 cells of three seeds; a GPU for days": 1,
        "72 cells and their controls; one cell runs below": 1,
    },
    "docs/rerank.md": {"asks a server": 1},
    "docs/table8.md": {
        'hundreds of cells; "Reproduce Table 8" runs two of them': 1,
        "some days of trials": 1,
    },
    "docs/tour.md": {"it trains for minutes; the next blocks run on a run of one step": 1},
    "docs/training.md": {"needs four GPUs": 1},
    "docs/transport.md": {"minutes to hours of measuring": 1},
}
"""Page to the reasons of its blocks that no test runs, so that none is added by the way."""
BLOCKS = all_blocks()
SHELL = [block for block in BLOCKS if block.language == "bash"]
RUNNING = [
    page for page in pages()
    if any(b.language in ("python", "bash") and not b.not_run and not b.ci for b in blocks_of(page))
]  # fmt: skip


def arguments_of(words):
    """What ``emd-retrieval`` is given, however it is started; None for another program."""
    if words[0] == "emd-retrieval":
        return words[1:]
    if "emd_retrieval.cli" in words:
        return words[words.index("emd_retrieval.cli") + 1 :]
    return None


COMMANDS = [
    pytest.param(arguments, id=f"{block}-{arguments[0]}")
    for block in SHELL
    for words in block.commands
    if (arguments := arguments_of(words)) is not None
]
SCRIPTS = [
    pytest.param(words[1], words[2:], id=f"{block}-{Path(words[1]).name}")
    for block in SHELL
    for words in block.commands
    if words[0] == "python" and words[1].endswith(".py")
]


class Session:
    """A reader at work on a page."""

    def __init__(self, page):
        self.module = types.ModuleType("page_of_the_documentation")
        self.page = page

    def run(self, block):
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
            exec(code, vars(self.module))  # noqa: S102
        elif block.language == "bash":
            for words in block.commands:
                self.type(words, block)

    def type(self, words, block):
        if words[0] == "emd-retrieval":
            assert main([*words[1:], "--quiet"]) == 0, f"{block}: {' '.join(words)}"
        else:
            subprocess.run(words, check=True, capture_output=True)


@pytest.mark.parametrize("page", RUNNING)
def test_the_blocks_of_a_page_run(page, reader, monkeypatch):
    session = Session(page)
    monkeypatch.setitem(sys.modules, session.module.__name__, session.module)
    for block in blocks_of(page):
        if not block.not_run and not block.ci:
            session.run(block)


def test_the_blocks_that_do_not_run_are_these(record_property):
    found = {}
    for block in BLOCKS:
        if block.not_run:
            found.setdefault(block.page, Counter())[block.not_run] += 1
    record_property("blocks", len(BLOCKS))
    record_property("not run", sum(sum(reasons.values()) for reasons in found.values()))
    assert found == NOT_RUN


def test_measured_facts_of_the_readme_are_those_of_the_records():
    """Every number of a row of the table stands in the record that the row links to."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("\n## Measured\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines() if "](results/" in line]
    assert len(rows) > 5
    for facts, record in rows:
        (link,) = re.findall(r"\]\((results/[\w/.]+\.md)\)", record)
        there = numbers_in((ROOT / link).read_text(encoding="utf-8"))
        missing = numbers_in(facts.replace("P@1", "")) - there
        assert not missing, f"{link} does not say {sorted(missing)}"


def numbers_in(text):
    return set(re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?", text.replace(",", "")))


def test_every_block_says_its_language():
    strange = [
        f"{block}: {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES
    ]
    assert not strange


def test_blocks_that_ci_runs_are_those_of_the_readme():
    named = {block.ci: block.code for block in BLOCKS if block.ci and block.page == "README.md"}
    assert named
    for block in BLOCKS:
        if block.ci:
            assert block.code == named[block.ci], str(block)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_is_one_that_there_is(arguments):
    build_parser().parse_args(arguments)


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_every_option_of_a_script_is_one_that_there_is(script, arguments):
    text = (ROOT / script).read_text(encoding="utf-8")
    for option in (word for word in arguments if word.startswith("-")):
        assert f'"{option}"' in text, f"{script} has no {option}"


def test_yaml_is_yaml():
    for block in BLOCKS:
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.code), dict), str(block)


def test_files_of_the_repository_that_are_named_are_there():
    named = r"(?<![\w/.-])((?:recipes|benchmarks|tests|emd_retrieval)/[\w/.-]*\.\w+)"
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        missing = [name for name in re.findall(named, text) if not (ROOT / name).exists()]
        assert not missing, f"{page}: {missing}"


def test_what_the_reader_of_pages_sees():
    """The tests above are only as good as what they read."""
    text = (
        "<!-- given\na = 1\n-->\n```python\nb = 2\n```\n\n<!-- not run: no GPU -->\n"
        "```bash\nx \\\n  --y 'a b'  # why\n# only a comment\nz\n```\nwords\n"
        '=== "Tab"\n    ```yaml title="f.yaml"\n    a: 1\n    ```\n'
        "<!-- ci: demo -->\n```bash\nq\n```"
    )
    given, python, shell, saved, ci = blocks_in(text, "page.md")
    assert (given.code, given.line, given.language) == ("a = 1\n", 2, "python")
    assert (python.code, python.line, python.not_run) == ("b = 2\n", 5, None)
    assert shell.not_run == "no GPU"
    assert shell.commands == [["x", "--y", "a b"], ["z"]]
    assert (saved.title, saved.code) == ("f.yaml", "a: 1\n")
    assert (ci.ci, ci.not_run) == ("demo", None)
    with pytest.raises(ValueError, match=r"page.md:1: a block without its closing"):
        blocks_in("```python\na = 1\n", "page.md")
