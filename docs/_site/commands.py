"""The page of all commands, from the parser itself: what ``--help`` says, in tables."""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File

PAGE = "reference/commands.md"
_INTRODUCTION = """# Commands

What `emd-retrieval COMMAND --help` says. Options that all commands share are in the last section.
Exit codes: 0 success, 1 a run that failed, 2 bad input, 130 after Ctrl-C.
"""
_COMMON = "running"


def on_files(files: Any, config: Any) -> Any:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page's markdown."""
    from emd_retrieval.cli.main import build_parser

    commands = list(leaves(build_parser()))
    sections = [_section(command) for command in commands]
    common = next(group for group in commands[0]._action_groups if group.title == _COMMON)
    return "\n".join([_INTRODUCTION, *sections, "## Options of every command\n", _table(common)])


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands below a parser that have no commands of their own."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for child in action.choices.values():
            yield from leaves(child)


def _section(parser: argparse.ArgumentParser) -> str:
    parts = [f"## {parser.prog}\n", f"{_text(parser.description)}\n"]
    for group in parser._action_groups:
        table = _table(group)
        if group.title == _COMMON or not table:
            continue
        if group.title not in ("options", "positional arguments"):
            parts.append(f"**{_text(group.title)}**\n")
        parts.append(table)
    if parser.epilog:
        title, _, examples = parser.epilog.partition("\n")
        parts.append(f"**{_text(title.strip(': ').capitalize())}**\n")
        parts.append(f"```bash\n{_commented(examples)}\n```\n")
    return "\n".join(parts)


def _table(group: Any) -> str:
    rows = [
        f"| `{_invocation(action)}` | {_text(action.help)} |"
        for action in group._group_actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
    ]
    if not rows:
        return ""
    return "\n".join(["| option | |", "| :--- | :--- |", *rows, ""])


def _invocation(action: argparse.Action) -> str:
    value = action.metavar
    if value is None and action.choices is not None:
        value = "|".join(str(choice) for choice in action.choices)
    if value is None and action.nargs != 0:
        value = action.dest.upper()
    if not action.option_strings:
        return str(value)
    names = ", ".join(action.option_strings)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return names
    return f"{names} [{value}]" if action.nargs == "?" else f"{names} {value}"


def _text(text: str | None) -> str:
    """Plain text in markdown: nothing in it is markup."""
    plain = html.escape(" ".join((text or "").split()), quote=False)
    for sign in "\\`*_[]|":
        plain = plain.replace(sign, f"\\{sign}")
    return plain


def _commented(examples: str) -> str:
    """The help's ``what:`` lines above deeper-set commands, as shell comments above commands."""
    lines = []
    for line in examples.rstrip().splitlines():
        if line.startswith("    "):
            lines.append(line[4:])
        else:
            lines.append(f"# {line.strip().removesuffix(':')}")
    return "\n".join(lines)
