"""The result record: what a finished run says of itself, and how it is written down.

A record holds tables (pandas), the settings, seed, data, command, commit, versions and hardware. It
knows nothing of what was measured; reports read it, runs write it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from emd_retrieval._checksums import sealed, unsealed
from emd_retrieval._files import whole_file, write_text
from emd_retrieval._tables import as_utf8

_PACKAGES = (
    "emd_retrieval", "torch", "pytorch-metric-learning", "timm", "faiss-cpu", "faiss-gpu", "POT",
    "numpy", "opencv-python-headless",
)  # fmt: skip


@dataclass(frozen=True)
class ResultRecord:
    """One run: its tables and everything needed to repeat it.

    Attributes:
        name: Short name, used for file names: letters, digits, ``-`` and ``_``.
        title: One line for people.
        tables: Result tables; the first is the main one.
        summary: The main table laid out for people; markdown shows it in its place.
        settings: Everything that was chosen, as plain JSON values.
        data: What the data was: name, counts, fingerprint.
        seed: Seed of the run.
        notes: Sentences for people: findings, warnings, what was left out.
        figures: File names of figures beside the record.
        command: The command line.
        created: UTC time, ISO 8601.
        commit: git commit of the code, with ``-dirty`` if it had changes; ``None`` outside git.
        versions: Versions of Python and the packages that matter.
        hardware: Processor, cores, memory, accelerators.
    """

    name: str
    title: str
    tables: Mapping[str, pd.DataFrame]
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    seed: int
    summary: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    command: str = field(default_factory=lambda: command_line())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    commit: str | None = field(default_factory=lambda: code_commit())
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    hardware: Mapping[str, Any] = field(default_factory=lambda: machine())

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(
                f"name: expected letters, digits, '-' and '_' (it names files), got {self.name!r}"
            )
        if not self.tables:
            raise ValueError("tables: expected at least one table, got none")

    @property
    def table(self) -> pd.DataFrame:
        """The main table."""
        return next(iter(self.tables.values()))

    def with_figures(self, figures: Sequence[str]) -> ResultRecord:
        """The same record naming figures written beside it, after those it names already."""
        return replace(self, figures=(*self.figures, *figures))

    def to_json(self) -> str:
        """The whole record as JSON with its checksum; tables as lists of rows."""
        content = {
            "name": self.name,
            "title": self.title,
            "created": self.created,
            "command": self.command,
            "commit": self.commit,
            "seed": self.seed,
            "settings": dict(self.settings),
            "data": dict(self.data),
            "notes": list(self.notes),
            "figures": list(self.figures),
            "versions": dict(self.versions),
            "hardware": dict(self.hardware),
            "summary": None if self.summary is None else _rows(self.summary),
            "tables": {name: _rows(table) for name, table in self.tables.items()},
        }
        plain = json.loads(json.dumps(content, default=str))
        return json.dumps(sealed(plain), indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """The record for people: tables, notes, then how it was made."""
        parts = [f"# {self.title}", ""]
        for number, (name, table) in enumerate(self.tables.items()):
            if number:
                parts += [f"## {name}", ""]
            elif self.summary is not None:
                table = self.summary
            parts += [markdown_table(table), ""]
        parts += [f"- {note}" for note in self.notes]
        parts += [""] * bool(self.notes)
        parts += [f"![{Path(file).stem}]({file})\n" for file in self.figures]
        parts += ["## How this was made", "", "```", self.command, "```", ""]
        facts = {
            "commit": self.commit or "not a git checkout",
            "seed": self.seed,
            "created": self.created,
            "data": _inline(self.data),
            "settings": _inline(self.settings),
            "hardware": _inline(self.hardware),
            "versions": _inline(self.versions),
        }
        parts += [f"- **{name}**: {value}" for name, value in facts.items()]
        return "\n".join(parts) + "\n"

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``NAME.json``, ``NAME.md`` and one CSV a table; each whole or not at all.

        Returns:
            The files written.
        """
        folder = Path(folder)
        files = []
        for number, (name, table) in enumerate(self.tables.items()):
            suffix = "" if number == 0 else "_" + "".join(c if c.isalnum() else "_" for c in name)
            file = folder / f"{self.name}{suffix}.csv"
            with whole_file(file) as partial:
                as_utf8(table).to_csv(partial, index=False)
            files.append(file)
        files.append(write_text(folder / f"{self.name}.md", self.to_markdown()))
        # The JSON comes last: where it is, the rest is complete.
        files.append(write_text(folder / f"{self.name}.json", self.to_json()))
        return files

    @classmethod
    def load(cls, path: str | Path) -> ResultRecord:
        """Read the JSON of a saved record.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a result record, or was altered since it was saved.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"record: {path.name} is not a result record ({error})") from error
        try:
            content = unsealed(content, f"record: {path.name}")
            tables = {name: pd.DataFrame(rows) for name, rows in content.pop("tables").items()}
            if content["summary"] is not None:
                content["summary"] = pd.DataFrame(content["summary"])
            content["notes"] = tuple(content["notes"])
            content["figures"] = tuple(content["figures"])
            return cls(tables=tables, **content)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"record: {path.name} is not a result record ({error})") from error


def markdown_table(table: pd.DataFrame) -> str:
    """A table in markdown; numbers right-aligned, floats with two decimals.

    Example:
        >>> print(markdown_table(pd.DataFrame({"method": ["Raw"], "P@1": [72.6]})))
        | method |   P@1 |
        | :----- | ----: |
        | Raw    | 72.60 |
    """
    columns = []
    for name in table.columns:
        values = table[name]
        numeric = pd.api.types.is_numeric_dtype(values)
        cells = [_cell(value) for value in values]
        header = _cell(str(name))
        width = max(3, len(header), *(len(cell) for cell in cells))
        align = str.rjust if numeric else str.ljust
        rule = "-" * (width - 1) + ":" if numeric else ":" + "-" * (width - 1)
        columns.append([align(header, width), rule, *(align(cell, width) for cell in cells)])
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns, strict=True))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.2f}"
    # A pipe or a line break inside a cell would break the table.
    return str(value).replace("|", "\\|").replace("\n", " ")


def _rows(table: pd.DataFrame) -> Any:
    return json.loads(as_utf8(table).to_json(orient="records", double_precision=10))


def _inline(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def command_line() -> str:
    """The command this process was started with, without machine-specific folders."""
    program = [Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"]
    if program == ["__main__.py"] and (spec := sys.modules["__main__"].__spec__) is not None:
        program = ["python", "-m", spec.parent or spec.name]
    return shlex.join([*program, *sys.argv[1:]])


def code_commit() -> str | None:
    """The git commit of the package's own checkout; ``None`` if it is not in one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", "-C", str(here), *arguments],  # noqa: S607
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        # An installed package may lie inside some other repository: then it is not tracked there.
        git("ls-files", "--error-unmatch", "records.py")
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD")[:12] + dirty
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide results."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerators of this machine."""
    import torch

    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        facts["memory_gib"] = round(pages * size / 2**30)
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
