"""The code blocks of README.md and docs/, as the tests of the documentation read them.

What a comment right above a block says of it:

``<!-- ci: NAME -->``
    CI runs it in an environment of its own (README.md has the block of that name).
``<!-- not run: REASON -->``
    It cannot run in a test; its options and types are checked all the same.

``<!-- given`` opens a block that readers do not see: the names that the next ones take as given.
A block with a title (``title="birds.yaml"``) is a file that the reader saves.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LANGUAGES = {"python", "bash", "yaml", "text"}
_OPEN = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\s*$")
_MARK = re.compile(r"<!-- (?P<kind>ci|not run): (?P<what>.+) -->")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Code of a page.

    Attributes:
        page: The page, relative to the repository.
        line: Line of the page that the code starts on.
        language: What stands after the opening fence.
        code: The code.
        title: Name of the file that the reader saves it as.
        ci: Name of README.md's block that CI runs.
        not_run: Why a test cannot run it.
    """

    page: str
    line: int
    language: str
    code: str
    title: str | None = None
    ci: str | None = None
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command of a shell block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def pages() -> list[str]:
    """README.md and all that people write in docs/."""
    written = sorted((ROOT / "docs").rglob("*.md"))
    return ["README.md", *(page.relative_to(ROOT).as_posix() for page in written)]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    return blocks_in((ROOT / page).read_text(encoding="utf-8"), page)


def blocks_in(text: str, page: str) -> list[Block]:
    """The blocks of a text.

    Raises:
        ValueError: If a block is not closed.
    """
    lines = text.splitlines()
    blocks: list[Block] = []
    mark: re.Match[str] | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        opened = _OPEN.match(line)
        if opened is None and line.strip() != "<!-- given":
            if line.strip():
                mark = _MARK.fullmatch(line.strip())
            continue
        closing = "-->" if opened is None else "```"
        end = next((i for i in range(number, len(lines)) if lines[i].strip() == closing), None)
        if end is None:
            raise ValueError(f"{page}:{number}: a block without its closing {closing}")
        indent = len(opened["indent"]) if opened else 0
        marks = {mark["kind"]: mark["what"]} if mark and opened else {}
        blocks.append(
            Block(
                page=page,
                line=number + 1,
                language=opened["language"] if opened else "python",
                code="\n".join(line[indent:] for line in lines[number:end]) + "\n",
                title=opened["title"] if opened else None,
                ci=marks.get("ci"),
                not_run=marks.get("not run"),
            )
        )
        number, mark = end + 1, None
    return blocks


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in pages() for block in blocks_of(page)]
