"""The page in a real headless Chromium; skipped where there is none."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
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
    opened.run("new Promise(requestAnimationFrame)")
    assert (focused(opened, "data-query"), focused(opened, "data-method")) == ("1", "0")


def test_all_flows_and_the_rebuilt_image(opened):
    opened.click(".neighbour")
    assert opened.run("document.querySelectorAll('.all line').length") == 0
    opened.click("[data-view=flows]")
    assert opened.run("document.querySelectorAll('.all line').length") == 2 * 6, "a line, an edge"
    colors = "[...document.querySelectorAll('.all line:nth-child(2n)')].map(l => l.outerHTML)"
    strokes = {line.split('stroke="')[1].split('"')[0] for line in opened.run(colors)}
    assert len(strokes) == 6, "a colour a cost"
    assert opened.run("document.getElementById('scale').hidden") is False
    assert text(opened, "#cheapest") == "0.10"
    assert text(opened, "#dearest") == "0.60"
    opened.hover(".node[data-side='0'][data-node='3']")
    assert opened.run("document.querySelectorAll('.line').length") == 2, "its own flows, on top"
    opened.click("[data-view=rebuilt]")
    # Query nodes 0 to 3; the whole image says nothing about parts.
    assert opened.run("document.querySelectorAll('#stage svg svg').length") == 4
    assert opened.run("document.querySelectorAll('.node').length") == 0
    assert opened.run("document.getElementById('flows').hidden")
    opened.click("#next")
    assert opened.run("document.querySelectorAll('#stage svg svg').length") == 4, "the view stays"
    opened.click("[data-view=parts]")
    assert opened.run("document.querySelectorAll('.node.on').length") == 1


def test_from_neighbour_to_neighbour(opened):
    opened.click(".neighbour")
    assert "neighbour 1 of 3 by Raw" in text(opened, "#match-facts")
    assert opened.run("document.getElementById('previous').disabled")
    opened.click("#next")
    assert "neighbour 2 of 3 by Raw" in text(opened, "#match-facts")
    opened.press("PageDown")
    assert "neighbour 3 of 3 by Raw" in text(opened, "#match-facts")
    opened.press("PageDown")
    assert "neighbour 3 of 3 by Raw" in text(opened, "#match-facts"), "there is no other"
    inside = "document.getElementById('match').contains(document.activeElement)"
    assert opened.run(inside), "the focus is not lost with the button"
    opened.press("PageUp")
    opened.press("Escape")
    opened.run("new Promise(requestAnimationFrame)")
    assert (focused(opened, "data-query"), focused(opened, "data-place")) == ("0", "1")


def test_on_a_phone_the_images_lie_below_each_other(opened):
    sides = (
        "[0, 1].map(s => document.querySelector(`.node[data-side='${s}']`))"
        ".map(node => node.getBoundingClientRect().y)"
    )
    opened.click(".neighbour")
    above, below = opened.run(sides)
    assert above == below
    opened.resize(390, 844)
    opened.run("new Promise(requestAnimationFrame)")
    above, below = opened.run(sides)
    assert above < below
    small = (
        "Math.min(...[...document.querySelectorAll('#match button:not([hidden])')]"
        ".map(b => b.getBoundingClientRect().height))"
    )
    assert opened.run(small) >= 40, "wide enough for a thumb"
    opened.click(".node[data-side='1'][data-node='2']")
    assert text(opened, "#part").startswith("Neighbour, bottom left of 4")


def test_words_can_be_read_in_the_dark(opened):
    opened.call("Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    contrast = """(() => {
      const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const words = ['h1', '.quiet', '.link', '.change-improved', '.change-worsened', 'small'];
      return words.map((s) => {
        const ink = light(getComputedStyle(document.querySelector(s)).color);
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); });
    })()"""
    try:
        assert min(opened.run(contrast)) >= 4.5
    finally:
        opened.call("Emulation.setEmulatedMedia", features=[])
    assert min(opened.run(contrast)) >= 4.5


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


def test_answers_of_unknown_classes(browser, tmp_path):
    file = tmp_path / "unlabelled.html"
    file.write_text(explorer.page_of([], explorer=explorer.unlabelled(), title="x"), "utf-8")
    browser.resize(1280, 900)
    browser.open(file)
    shown = browser.run("[...document.querySelectorAll('[data-change]')].map(b => b.textContent)")
    assert shown == ["All (6)", "New first answer (3)", "Reordered (0)", "Unchanged (3)"]
    assert browser.run("document.querySelectorAll('.neighbour b, #class').length") == 0
    assert text(browser, ".tile") == "away.jpg", "a picture that is not at hand"
    assert browser.run("document.querySelectorAll('.neighbour').length") == 6 * 6 - 2
    browser.click("[data-change='new first answer']")
    assert cards(browser) == 3
    browser.click(".neighbour")
    assert text(browser, "#match-title") == "0.jpg → 1.jpg"
    assert text(browser, "#match-facts").startswith("neighbour 1 of 3 by first stage · ")
    assert browser.errors == []


def test_levels_are_grids_and_random_patches_are_one(browser, tmp_path):
    """Cells that reach beyond the image are cut, so that those of a level differ in size."""
    centres = [((i % n + 0.5) / n, (i // n + 0.5) / n, 1 / n) for n in (3, 2) for i in range(n * n)]
    boxes = np.array([[x - s, y - s, x + s, y + s] for x, y, s in centres], np.float32).clip(0, 1)
    random = np.random.default_rng(0).random((13, 2)).astype(np.float32) * 0.5
    for layout, words in ((boxes, ["9 parts", "4 parts"]), (np.hstack([random, random + 0.3]), [])):
        page = explorer.small_explorer(queries=4)
        weights = np.full(13, 1 / 13, np.float32)
        pairs = np.stack([np.arange(13)] * 2, axis=1).astype(np.uint16)
        match = explorer.Match(0.5, weights, weights, pairs, weights, weights)
        page = dataclasses.replace(
            page,
            pictures=[dataclasses.replace(picture, boxes=layout) for picture in page.pictures],
            matches=dict.fromkeys(page.matches, match),
        )
        file = tmp_path / "levels.html"
        file.write_text(explorer.page_of([], explorer=page, title="x"), encoding="utf-8")
        browser.open(file)
        browser.click(".neighbour")
        found = "[...document.querySelectorAll('#sizes button')].map(b => b.textContent)"
        assert browser.run(found) == words
    assert browser.errors == []


def test_thousands_of_queries_stay_usable(browser, tmp_path):
    file = tmp_path / "many.html"
    text_of_page = explorer.page_of([], explorer=explorer.small_explorer(queries=3000), title="x")
    file.write_text(text_of_page, encoding="utf-8")
    browser.open(file)
    assert text(browser, "#count") == "3000 queries"
    assert cards(browser) == 30, "as many as are looked at"
    browser.click("[data-change=worsened]")
    assert text(browser, "#count") == "1000 queries"
    assert cards(browser) == 30
    assert browser.errors == []
