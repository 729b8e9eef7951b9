import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from emd_retrieval.reports import GalleryRow, Neighbour, gallery_figure, save_figure, short_label
from emd_retrieval.reports.gallery import RIGHT_COLOR, WRONG_COLOR


def picture(value=128, size=(20, 30)):
    return np.full((*size, 3), value, dtype=np.uint8)


def row(before, after, label="robin", caption="MAP@R 10 → 20"):
    """A query with answers right where the pattern says ``1``."""
    sides = (
        [Neighbour(picture(20 * i), mark == "1", f"class {i}") for i, mark in enumerate(pattern)]
        for pattern in (before, after)
    )
    return GalleryRow(picture(), label, caption, *sides)


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def marks(figure):
    """For each image with a mark: the mark, and whether its frame has the mark's colour."""
    colours = {"✓": to_rgba(RIGHT_COLOR), "✗": to_rgba(WRONG_COLOR)}
    found = []
    for axes in figure.axes:
        marks = [text.get_text() for text in axes.texts if text.get_text() in colours]
        if marks:
            (mark,) = marks
            frame = {spine.get_edgecolor() for spine in axes.spines.values()}
            assert frame == {colours[mark]}, "the frame says what the mark says"
            found.append(mark)
    return found


def test_every_answer_is_marked_right_or_wrong():
    figure = gallery_figure([row("010", "111"), row("000", "101")], after="DeepEMD-FCN")
    assert "".join(marks(figure)) == "✗✓✗✓✓✓✗✗✗✓✗✓"
    assert len(figure.axes) == 2 * (1 + 3 + 3)
    assert all(len(axes.images) == 1 for axes in figure.axes)


def test_names_captions_and_the_classes_of_wrong_answers():
    figure = gallery_figure(
        [row("01", "11", label="001.Black_footed_Albatross")], before="Raw", after="EMD", title="T"
    )
    shown = texts(figure)
    for text in ("Raw", "EMD", "T", "Black footed Albatross", "MAP@R 10 → 20", "class 0"):
        assert text in shown
    assert "class 1" not in shown, "right answers need no name"


@pytest.mark.parametrize(("rows", "neighbours"), [(1, 1), (3, 5), (4, 8)])
def test_the_file_has_the_size_of_its_content(rows, neighbours, tmp_path):
    figure = gallery_figure([row("1" * neighbours, "0" * neighbours)] * rows)
    width, height = figure.get_size_inches() * figure.dpi
    with Image.open(save_figure(figure, tmp_path / "gallery.png")) as image:
        assert image.format == "PNG"
        assert image.size == pytest.approx((width, height), abs=1)
    other = gallery_figure([row("1" * neighbours, "0" * neighbours)] * (rows + 1))
    assert other.get_size_inches()[1] > figure.get_size_inches()[1]


@pytest.mark.parametrize(
    "name",
    [
        "$\\frac{1$ broken",
        "a $x$ b $y_{$",
        "<b>bold</b> & more",
        "x" * 300,
        "",
        "Möwe\nzwei",
        "%s {0}",
    ],
)
def test_names_are_shown_as_they_are(name, tmp_path):
    """Dollar signs in a folder's name are no formula."""
    figure = gallery_figure([row("01", "10", label=name, caption=name)], title=name, before=name)
    save_figure(figure, tmp_path / "gallery.png")
    assert short_label(name) in texts(figure)
    for text in figure.findobj(Text):
        assert not (text.get_text() and text.get_parse_math())


def test_short_labels():
    assert short_label("001.Black_footed_Albatross") == "Black footed Albatross"
    assert short_label("robin_red.breast") == "robin_red.breast", "only numbered folders are CUB's"
    assert short_label("7") == "7"
    assert short_label("x" * 30) == "x" * 25 + "…"
    assert short_label("012.a_b c", 4) == "a b…"


def test_pictures_of_any_shape(tmp_path):
    wide = GalleryRow(picture(size=(10, 90)), "a", "", [Neighbour(picture(), True, "a")] * 2, [])
    save_figure(gallery_figure([wide]), tmp_path / "gallery.png")


def test_refuses_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="rows: expected at least one query to show, got none"):
        gallery_figure([])
    with pytest.raises(ValueError, match=r"same numbers of neighbours, got \[\(1, 1\), \(2, 2\)\]"):
        gallery_figure([row("1", "1"), row("11", "11")])


@pytest.mark.parametrize("label", ["W" * 40, "001." + "m" * 26, "Great_Grey_Shrike " * 3])
def test_wide_names_stay_on_the_page_and_beside_each_other(label):
    figure = gallery_figure([row("01", "10", label=label), row("01", "10", label=label)])
    figure.draw_without_rendering()
    width = figure.bbox.width
    columns = [figure.axes[i].get_window_extent() for i in (0, 1)]
    for axes in figure.axes:
        for text in axes.findobj(Text):
            if text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= 0
                assert box.x1 <= width
    title = figure.axes[0].get_title(loc="left")
    assert title == short_label(label)
    (shown,) = [text for text in figure.axes[0].findobj(Text) if text.get_text() == title]
    assert shown.get_window_extent().x0 >= columns[0].x0 - 1
