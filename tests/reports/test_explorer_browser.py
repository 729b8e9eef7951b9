"""The page in a real headless Chromium; skipped where there is none."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def beside(name):
    spec = importlib.util.spec_from_file_location(f"reports_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


chromium = beside("chromium")
explorer = beside("test_explorer")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = chromium.find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    browser = chromium.Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    records = [explorer.small_record()]
    text = explorer.page_of(records, explorer=explorer.small_explorer(queries=70))
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def opened(browser, page):
    browser.resize(1280, 900)
    browser.open(page)
    yield browser
    assert browser.errors == []
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [page.resolve().as_uri()], "the page fetches nothing"


def text(browser, selector):
    return browser.run(f"document.querySelector({selector!r}).textContent")


def focused(browser, attribute):
    return browser.run(f"document.activeElement.getAttribute({attribute!r})")


def cards(browser):
    return browser.run("document.querySelectorAll('.query').length")


def test_it_loads_and_draws_part_of_the_queries(opened):
    assert cards(opened) == 30
    assert text(opened, "#count") == "70 queries"
    opened.click("#more")
    assert cards(opened) == 60
    opened.click("#more")
    assert cards(opened) == 70
    assert opened.run("document.getElementById('more').hidden")
    assert opened.run(
        "[...document.querySelectorAll('.query img')].every(i => i.loading == 'lazy')"
    )


def test_markup_in_names_does_nothing(opened):
    assert opened.run("window.broken") is None
    assert opened.run("document.querySelectorAll('img[src=x]').length") == 0
    assert explorer.MARKUP in text(opened, "#class")


def test_filters_by_change_and_class(opened):
    opened.click("[data-change=improved]")
    assert text(opened, "[data-change=improved]") == "Improved (24)"
    assert text(opened, "#count") == "24 queries"
    improved = "[...document.querySelectorAll('.query')].map(q => /improved/.test(q.textContent))"
    assert opened.run(improved) == [True] * 24
    opened.run("(() => { const c = document.getElementById('class'); c.value = '1';"
               "c.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert text(opened, "#count") == "12 queries"
    assert text(opened, "[data-change=all]") == "All (35)"
    opened.click("[data-change=all]")
    opened.click("#classes [data-class='0']")
    assert text(opened, "#count") == "35 queries"
    assert opened.run("document.getElementById('class').value") == "0"


def test_a_click_opens_a_match_and_pointing_shows_flows(opened):
    opened.click(".neighbour")
    assert opened.run("document.getElementById('match').open")
    assert "similarity by EMD 0.750" in text(opened, "#match-facts")
    opened.hover(".node[data-side='0'][data-node='3']")
    assert text(opened, "#part").startswith("Query, bottom right of 4: ")
    flows = opened.run("[...document.querySelectorAll('#flows li')].map(i => i.textContent)")
    assert flows == ["50 % to top left of 4, cost 0.400", "50 % to the whole image, cost 0.500"]
    assert opened.run("document.querySelectorAll('.node.to').length") == 2
    assert opened.run("document.querySelectorAll('.line').length") == 2
    opened.hover(".node[data-side='1'][data-node='2']")
    assert text(opened, "#flows") == "100 % from top right of 4, cost 0.200"
    opened.click("[data-level='1']")
    assert text(opened, "#part").startswith("Query, the whole image: ")
    opened.click("#close")
    assert not opened.run("document.getElementById('match').open")


def test_all_of_it_works_by_keyboard(opened):
    opened.run("document.querySelector('.neighbour').focus()")
    opened.press("ArrowRight")
    assert focused(opened, "data-place") == "1"
    opened.press("ArrowDown")
    assert (focused(opened, "data-method"), focused(opened, "data-place")) == ("1", "1")
    opened.press("ArrowDown")
    assert (focused(opened, "data-query"), focused(opened, "data-method")) == ("1", "0")
    outline = opened.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus can be seen"
    opened.press("Enter")
    assert opened.run("document.getElementById('match').open")
    opened.run("document.querySelector(\".node[data-side='0'][data-node='0']\").focus()")
    first = text(opened, "#part")
    assert first.startswith("Query, top left of 4")
    opened.press("ArrowRight")
    assert text(opened, "#part").startswith("Query, top right of 4")
    opened.press("ArrowRight")
    assert text(opened, "#part").startswith("Neighbour, top left of 4"), "on to the other image"
    opened.press("ArrowDown")
    assert text(opened, "#part").startswith("Neighbour, bottom left of 4")
    assert focused(opened, "aria-label").startswith("neighbour, bottom left of 4, weight ")
    opened.press("Escape")
    assert not opened.run("document.getElementById('match').open")
    assert (focused(opened, "data-query"), focused(opened, "data-method")) == ("1", "0")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(opened, width):
    opened.resize(width, 844)
    assert opened.run("document.documentElement.scrollWidth") <= width
    opened.click(".neighbour")
    assert opened.run("document.getElementById('match').scrollWidth") <= width


def test_without_boxes_neighbours_stay_and_open_nothing(browser, tmp_path):
    file = tmp_path / "plain.html"
    file.write_text(
        explorer.page_of([], explorer=explorer.small_explorer(boxes=False)), encoding="utf-8"
    )
    browser.open(file)
    browser.click(".neighbour")
    assert not browser.run("document.getElementById('match').open")
    assert focused(browser, "aria-disabled") == "true"
    assert browser.errors == []
