"""What lies in the repository but not in docs/ and belongs on the site: results, the changelog.

Sources link to it as GitHub would follow the link (``../results/x.md``); on the site it lies at
``results/`` and ``changelog.md``, and links are rewritten to that.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
RECORDS = "<!-- every result record -->"
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)((?:#[^)]*)?\))")
_CELL = re.compile(r"<td[ >](?:(?!<code).)*?</td>", re.DOTALL)
_INTERVAL = re.compile(r"\[([-+]?\d[\d.]*), ([-+]?\d[\d.]*)\]")
_SHOWN = {".md", ".png", ".svg", ".csv", ".tex", ".json"}


def on_config(config: Any) -> Any:
    """Every result page stands in the navigation below Results."""
    section = next(entry["Results"] for entry in config.nav if "Results" in entry)
    section[1:] = [{_title(page): uri} for uri, page in _result_pages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Results and the changelog as if they lay in docs/."""
    for file in sorted((ROOT / "results").rglob("*")):
        if file.suffix in _SHOWN:
            uri = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(file)))
    changelog = str(ROOT / "CHANGELOG.md")
    files.append(File.generated(config, "changelog.md", abs_src_path=changelog))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are on the site, and the table of all records where a page asks for it."""
    uri = page.file.src_uri
    generated = uri == "changelog.md" or (uri.startswith("results/") and uri != "results/index.md")
    if not generated:
        home = posixpath.dirname(f"docs/{uri}")
        markdown = _LINK.sub(lambda found: _on_site(found, home), markdown)
    if generated and uri != "changelog.md":
        page.meta["hide"] = ["toc"]  # records have wide tables
    if RECORDS in markdown:
        markdown = markdown.replace(RECORDS, _table_of_records())
    return markdown


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """In tables an interval stays on one line, and so does a number with its spread."""
    return _CELL.sub(lambda cell: _unbroken(cell.group(0)), content)


def _unbroken(cell: str) -> str:
    cell = _INTERVAL.sub("[\\1,\N{NO-BREAK SPACE}\\2]", cell)
    return cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _on_site(found: re.Match[str], home: str) -> str:
    before, target, after = found.groups()
    path = posixpath.normpath(posixpath.join(home, target))
    if path == "CHANGELOG.md":
        path = "changelog.md"
    elif not path.startswith("results/"):
        return found.group(0)
    here = home.removeprefix("docs").lstrip("/") or "."
    return before + posixpath.relpath(path, here) + after


def _result_pages() -> list[tuple[str, Path]]:
    pages = sorted((ROOT / "results").rglob("*.md"))
    return [(page.relative_to(ROOT).as_posix(), page) for page in pages]


def _title(page: Path) -> str:
    first = page.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def _table_of_records() -> str:
    """One row a page: title, command, commit and day, as the record says them."""
    rows = ["| result | command | commit | day |", "| :--- | :--- | :--- | :--- |"]
    for uri, page in _result_pages():
        text = page.read_text(encoding="utf-8")
        command = re.search(r"## How this was made\s+```\w*\n(.*?)\n```", text, re.DOTALL)
        if command is None:
            continue
        said = dict(re.findall(r"^- \*\*(commit|created)\*\*: (\S+)", text, re.MULTILINE))
        link = posixpath.relpath(uri, "results")
        line = " ".join(command.group(1).replace("\\\n", " ").split())
        if not line.startswith("emd-retrieval"):
            line = f"python benchmarks/{line}"
        rows.append(
            f"| [{_title(page)}]({link}) | `{line}` | {said.get('commit', '')[:12]} "
            f"| {said.get('created', '')[:10]} |"
        )
    return "\n".join(rows)
