"""The documentation site, built strictly: it is whole, and it fetches nothing from the network."""

import argparse
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from test_architecture import floors_of_the_docs

from emd_retrieval.cli.main import build_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NO_REFERENCE = {"progress", "settings", "cli"}
"""Rooms that users do not import, or whose reference is the page of commands."""
FETCHED = {
    ("script", "src"), ("img", "src"), ("img", "srcset"), ("source", "src"), ("source", "srcset"),
    ("video", "src"), ("audio", "src"), ("iframe", "src"), ("embed", "src"), ("object", "data"),
    ("use", "href"), ("image", "href"), ("input", "src"), ("form", "action"),
}  # fmt: skip
"""What a browser asks for by itself; ``<link>`` is looked at by its ``rel``."""
FOLLOWED = {"canonical", "next", "prev", "license", "author"}


class Resources(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        for name, value in attributes:
            if (tag, name) in FETCHED:
                self.found.append(value or "")
            elif name == "style":
                self.found += in_css(value or "")
        if tag == "link" and not set((about.get("rel") or "").split()) <= FOLLOWED:
            self.found.append(about.get("href") or "")
        if about.get("http-equiv", "").lower() == "refresh":
            self.found.append(about.get("content") or "")


def in_css(text):
    return re.findall(r"url\(\s*['\"]?([^)'\"]+)", text) + re.findall(
        r"@import\s+['\"]([^'\"]+)", text
    )


def is_remote(address):
    return re.match(r"\s*(?:[a-z]+:)?//", address, re.IGNORECASE) is not None


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip('mkdocs is not installed (pip install "emd_retrieval[docs]")')
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def inventory(site):
    """Names that the reference has a place for."""
    _, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def pages_in_the_navigation(entries):
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from pages_in_the_navigation(value)
        else:
            yield value


class _NavigationLoader(yaml.SafeLoader):
    """mkdocs.yml may name Python objects; here they are not needed."""


_NavigationLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def commands_of(parser):
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for child in action.choices.values():
            yield from commands_of(child)


def test_no_page_makes_a_browser_fetch_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        reader = Resources()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.found, f"{page.name} has no style sheet"
        remote = [address for address in reader.found if is_remote(address)]
        assert not remote, f"{page.relative_to(site)}: {remote}"


def test_no_style_sheet_fetches_from_the_network(site):
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        remote = [a for a in in_css(sheet.read_text(encoding="utf-8")) if is_remote(a)]
        assert not remote, f"{sheet.name}: {remote}"


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="https://x.org/a.js"></script>',
        '<link rel="stylesheet" href="//x.org/a.css">',
        '<link rel="preconnect" href="https://x.org">',
        '<img src="http://x.org/a.png">',
        '<p style="background: url(https://x.org/a.png)">',
        '<svg><use href="https://x.org/a.svg#b"/></svg>',
    ],
)
def test_the_reader_sees_every_kind_of_fetch(markup):
    """The checks above are only as good as what they read."""
    reader = Resources()
    reader.feed(markup)
    assert [is_remote(address) for address in reader.found] == [True]


def test_every_page_is_in_the_navigation():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _NavigationLoader)  # noqa: S506
    named = list(pages_in_the_navigation(config["nav"]))
    written = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    generated = {"changelog.md", "reference/commands.md"}
    assert len(named) == len(set(named))
    assert set(named) == written | generated


def test_every_result_page_is_on_the_site(site):
    for page in (ROOT / "results").rglob("*.md"):
        built = (site / page.relative_to(ROOT)).with_suffix(".html")
        assert built.is_file(), built
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert title in (site / "results" / "index.html").read_text(encoding="utf-8"), title


def test_every_room_has_a_reference_page():
    pages = {page.stem for page in (DOCS / "reference").glob("*.md")} - {"index"}
    rooms = {room for room in floors_of_the_docs() if not room.startswith("_")}
    assert pages == rooms - NO_REFERENCE


def test_every_public_name_is_in_the_reference(inventory):
    for page in (DOCS / "reference").glob("*.md"):
        if page.stem == "index":
            continue
        room = importlib.import_module(f"emd_retrieval.{page.stem}")
        for name in getattr(room, "__all__", ()):
            value = getattr(room, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                places = {f"{room.__name__}.{name}", f"{value.__module__}.{value.__qualname__}"}
                assert places & inventory, f"{room.__name__}.{name}"


def test_the_page_of_commands_has_every_option_of_every_command(site):
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    commands = list(commands_of(build_parser()))
    assert len(commands) > 10
    for command in commands:
        assert f">{command.prog}" in page, command.prog
        for action in command._actions:
            for option in action.option_strings:
                assert option in page or option in ("-h", "--help"), f"{command.prog} {option}"
