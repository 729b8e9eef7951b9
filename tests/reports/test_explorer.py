import base64
import dataclasses
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from emd_retrieval.records import ResultRecord
from emd_retrieval.reports.explorer import ExplorerData, Match, PageFigure, Picture, Query
from emd_retrieval.reports.explorer import render_page as page_of
from emd_retrieval.reports.explorer.data import ClassResult

MARKUP = '</script><img src=x onerror="broken=1">&amp;'


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), color).save(buffer, "JPEG")
    return buffer.getvalue()


def quarters():
    places = np.array([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5]], np.float32)
    boxes = np.concatenate([places, places + 0.5], axis=1)
    return np.concatenate([boxes, [[0, 0, 1, 1]]]).astype(np.float32)


def small_explorer(queries=9, boxes=True):
    """Queries in turn improved, worsened and unchanged, of two classes; one name is markup."""
    generator = np.random.default_rng(0)
    pictures = [
        Picture(f"{i}.jpg", i % 2, (48, 40), jpeg((20 * i % 255, 90, 60)),
                quarters() if boxes else None)
        for i in range(queries)
    ]  # fmt: skip
    scores = [((40.0, 60.0), (60.0, 40.0), (50.0, 50.0))[i % 3] for i in range(queries)]
    neighbours = [
        np.array([[j for j in range(queries) if j != i][:3]] * 2, np.int32) for i in range(queries)
    ]
    kept = [
        Query(i, scores[i], neighbours[i],
              np.array([[0.9, 0.8, 0.7], [0.8, 0.6, -np.inf]], np.float32))
        for i in range(queries)
    ]  # fmt: skip
    matches = {}
    for query in kept if boxes else []:
        for other in set(query.neighbours.ravel().tolist()):
            weights = generator.dirichlet(np.ones(5)).astype(np.float16)
            matches[query.picture, other] = Match(
                0.75, weights, weights[::-1].copy(),
                np.array([[0, 1], [1, 2], [2, 3], [3, 0], [3, 4], [4, 4]], np.uint16),
                np.full(6, 1 / 6, np.float16), np.linspace(0.1, 0.6, 6).astype(np.float16),
            )  # fmt: skip
    return ExplorerData(
        methods=("Raw", "DeepEMD-FCN"), metric="MAP@R", class_names=("robin", MARKUP),
        total=20, pictures=pictures, queries=kept, matches=matches,
        classes=(ClassResult("robin", 10, 40.0, 55.5), ClassResult(MARKUP, 10, 60.0, 50.0)),
    )  # fmt: skip


def unlabelled(queries=6):
    """The same without classes; the first half has a new first answer, one picture is missing."""
    explorer = small_explorer(queries)
    pictures = [dataclasses.replace(picture, label=-1) for picture in explorer.pictures]
    pictures[-1] = dataclasses.replace(pictures[-1], jpeg=b"", boxes=None, name="far/away.jpg")
    kept = []
    for number, query in enumerate(explorer.queries):
        neighbours = query.neighbours.copy()
        if number < queries // 2:
            neighbours[1] = neighbours[1][[1, 0, 2]]
        elif number == queries - 1:
            neighbours[:, 2] = -1
        kept.append(
            dataclasses.replace(query, neighbours=neighbours, scores=(np.nan, np.nan),
                                similarities=np.full((2, 3), [[np.nan], [0.5]], np.float32))
        )  # fmt: skip
    missing = len(pictures) - 1
    matches = {pair: match for pair, match in explorer.matches.items() if missing not in pair}
    return dataclasses.replace(
        explorer, pictures=pictures, queries=kept, matches=matches, class_names=(), classes=(),
        methods=("first stage", "re-ranked by EMD"), metric="",
    )  # fmt: skip


def small_record(title="Raw against DeepEMD"):
    table = pd.DataFrame({"method": ["Raw", MARKUP], "MAP@R": [40.25, float("nan")]})
    return ResultRecord(
        name="evaluate", title=title, tables={"metrics": table}, settings={"crop": 224},
        data={"images": 20, "num_classes": 2}, seed=3, notes=("A note.",), command="a command",
        created="2026-01-02T03:04:05+00:00", commit=None, versions={"python": "3.11"},
        hardware={"cores": 2},
    )  # fmt: skip


def payload(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text.group(1))


def assert_same(a, b):
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b or (a != a and b != b)


@pytest.mark.parametrize("boxes", [True, False, None])
def test_saved_data_come_back(tmp_path, boxes):
    explorer = unlabelled() if boxes is None else small_explorer(boxes=boxes)
    explorer = dataclasses.replace(
        explorer,
        matches={
            pair: dataclasses.replace(match, flow=match.flow[:n], cost=match.cost[:n],
                                      pairs=match.pairs[:n])
            for n, (pair, match) in enumerate(explorer.matches.items(), 1)
        },
    )  # fmt: skip
    file = explorer.save(tmp_path / "explorer.npz")
    assert_same(explorer, ExplorerData.load(file))


def test_files_that_are_none_are_refused(tmp_path):
    file = tmp_path / "explorer.npz"
    file.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"explorer\.npz is not readable"):
        ExplorerData.load(file)
    header = np.frombuffer(b'{"version": 99}', np.uint8)
    np.savez(file, header=header)
    with pytest.raises(ValueError, match="version 99, this code reads 1"):
        ExplorerData.load(file)
    np.savez(file, header=np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="not readable"):
        ExplorerData.load(file)
    with pytest.raises(FileNotFoundError):
        ExplorerData.load(tmp_path / "other.npz")


def test_a_page_holds_tables_classes_and_data():
    explorer = small_explorer()
    page = page_of([small_record()], explorer=explorer)
    assert '<td class="number">40.25</td>' in page
    assert ">nan<" not in page
    assert "2026-01-02 · seed 3 · 20 images · 2 classes" in page
    assert "9 of 20 queries" in page
    assert "+15.5" in page
    assert "-10.0" in page
    data = payload(page)
    assert data["queries"][0] == [0, [40, 60], [[1, 2, 3]] * 2, [[0.9, 0.8, 0.7], [0.8, 0.6, None]]]
    assert data["layouts"] == [quarters().tolist()], "one set of boxes for all pictures"
    match = explorer.matches[0, 1]
    similarity, *sizes, packed = data["matches"]["0 1"]
    words = np.frombuffer(base64.b64decode(packed), "<u2")
    assert (similarity, sizes) == (0.75, [5, 5])
    assert words[:5] / 65535 == pytest.approx(match.query_weights, abs=1e-5)
    assert words[5:10] / 65535 == pytest.approx(match.reference_weights, abs=1e-5)
    flows = words[10:].reshape(-1, 4)
    np.testing.assert_array_equal(flows[:, :2], match.pairs)
    assert flows[:, 2] / 65535 == pytest.approx(match.flow, abs=1e-5)
    low, high = data["costs"]
    assert low + flows[:, 3] / 65535 * (high - low) == pytest.approx(match.cost, abs=1e-4)
    size = re.search(r"one file of (\d+) kB", page)
    assert int(size.group(1)) == pytest.approx(len(page.encode()) / 1e3, abs=1)


def test_names_with_markup_stay_text():
    page = page_of([small_record(MARKUP)], explorer=small_explorer())
    assert "<img src=x" not in page
    assert "&lt;/script&gt;&lt;img src=x" in page
    assert payload(page)["classes"][1].startswith("</script><img")


def test_figures_are_inside_and_nothing_is_outside():
    figure = PageFigure("Curve <1>", "What it shows", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    page = page_of([small_record()], figures=[figure])
    assert "Curve &lt;1&gt;" in page
    assert 'alt="What it shows"' in page
    assert 'id="data"' not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)


def test_intervals_are_quieter_and_groups_are_named():
    record = dataclasses.replace(
        small_record(),
        tables={"metrics": pd.DataFrame({"method": ["gain of <b>"], "P@1": ["+1.5 [+0.2, +2.9]"]})},
        settings={"model": {"pyramid": (3, 2), "layer": None}, "overrides": []},
    )
    page = page_of([record])
    assert '+1.5 <span class="interval">[+0.2, +2.9]</span>' in page
    assert '<tr class="gain"><td>gain of &lt;b&gt;</td>' in page
    assert "<dd>model.pyramid 3 2</dd>" in page


def test_long_tables_are_folded_except_the_first():
    rows = pd.DataFrame({"step": range(30)})
    record = dataclasses.replace(small_record(), tables={"metrics": rows, "runs": rows})
    page = page_of([record])
    assert page.count('<details class="long">') == 1
    assert "Runs (30 rows)" in page


def test_names_that_are_no_utf8_are_spelt_out(tmp_path):
    odd = "caf\udce9.jpg"
    explorer = small_explorer()
    pictures = [dataclasses.replace(explorer.pictures[0], name=odd), *explorer.pictures[1:]]
    explorer = dataclasses.replace(explorer, pictures=pictures)
    explorer = ExplorerData.load(explorer.save(tmp_path / "explorer.npz"))
    page = page_of([small_record(odd)], explorer=explorer)
    assert "<h1>caf\\udce9.jpg</h1>" in page
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert payload(page)["pictures"][0][2] == odd


def test_phones_get_their_own_drawing():
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    page = page_of([small_record()], figures=[PageFigure("Curve", "What", svg, svg + b" ")])
    found = re.findall(r'(?:srcset|src)="data:image/svg\+xml;base64,([^"]*)"', page)
    assert [base64.b64decode(part) for part in found] == [svg + b" ", svg]


def test_a_page_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got none"):
        page_of([])
