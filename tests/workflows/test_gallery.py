import numpy as np
import pytest
import torch

from emd_retrieval.datasets import ImageCollection
from emd_retrieval.features import FeatureSet
from emd_retrieval.features.pyramid import pyramid_boxes
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import Ranking, compare_rankings
from emd_retrieval.workflows.gallery import (
    ImageSide,
    choose_queries,
    gallery_rows,
    match_pictures,
    save_pictures,
)

CLASSES, PER_CLASS = 8, 4
LABELS = np.repeat(np.arange(CLASSES), PER_CLASS)


@pytest.fixture
def side(generator):
    """Each image is of one grey, 3 times its row; the features are of no account."""
    count = len(LABELS)
    images = np.tile(3 * np.arange(count, dtype=np.uint8)[:, None, None, None], (1, 20, 30, 3))
    names = tuple(f"class {i}" for i in range(CLASSES))
    collection = ImageCollection("greys", images, LABELS, names, tuple(range(1, CLASSES + 1)))
    nodes = torch.randn(count, 5, 6, generator=generator)
    rows = torch.arange(count)
    return ImageSide(
        collection, FeatureSet(nodes, nodes.mean(dim=1), torch.from_numpy(LABELS), rows)
    )


def rank(hits):
    """Answers of three per query: right ones where the pattern of the query says ``1``."""
    rows = []
    for query, pattern in enumerate(hits):
        own = [row for row in range(len(LABELS)) if LABELS[row] == LABELS[query] and row != query]
        other = [row for row in range(len(LABELS)) if LABELS[row] != LABELS[query]]
        rows.append([own.pop(0) if hit == "1" else other.pop(query % 5) for hit in pattern])
    return Ranking(torch.tensor(rows), torch.linspace(1, 0, 3).expand(len(rows), 3))


@pytest.fixture
def evaluation():
    """Class 0 gains most, then 1 and 2; class 7 loses; the others stay."""
    before = ["000"] * 4 + ["001"] * 4 + ["010"] * 4 + ["110"] * 20
    after = ["111"] * 12 + ["110"] * 16 + ["000"] * 4
    labels = torch.from_numpy(LABELS)
    return compare_rankings({"Raw": rank(before), "DeepEMD": rank(after)}, labels)


def test_chooses_gains_a_middle_and_a_loss_each_of_its_own_class(evaluation, side):
    chosen = choose_queries(evaluation, side, side, improved=3, unchanged=1, worsened=1)
    classes = [int(LABELS[row]) for row in chosen]
    assert classes[:3] == [0, 1, 2], "those that gained most come first"
    assert classes[3] in (3, 4, 5, 6), "in the middle nothing changes"
    assert classes[4] == 7
    assert len(set(classes)) == 5


def test_chooses_fewer_where_classes_run_out(evaluation, side):
    chosen = choose_queries(evaluation, side, side, improved=20, unchanged=5, worsened=5)
    assert len(chosen) == CLASSES


def test_rows_show_the_answers_of_both_rankings(evaluation, side):
    first, second = evaluation.rankings.values()
    (row,) = gallery_rows(evaluation, side, side, [4], neighbours=2)
    assert row.label == "class 1"
    assert row.caption == "MAP@R 11 → 100"
    assert (row.query == 3 * 4).all()
    for answers, ranking in ((row.before, first), (row.after, second)):
        expected = ranking.rows[4, :2].tolist()
        assert [int(answer.image[0, 0, 0]) // 3 for answer in answers] == expected
        assert [answer.label for answer in answers] == [f"class {LABELS[i]}" for i in expected]
    assert [answer.right for answer in row.before] == [False, False]
    assert [answer.right for answer in row.after] == [True, True]
    assert row.query.shape == (160, 160, 3)


def test_rows_of_features_are_not_rows_of_the_collection(evaluation, side):
    """Features in another order than the images, as after a subset."""
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    shuffled = ImageSide(side.collection, side.features.subset(order))
    labels = shuffled.features.labels
    ranking = Ranking(torch.arange(len(LABELS)).roll(-1).view(-1, 1).repeat(1, 3),
                      torch.zeros(len(LABELS), 3))  # fmt: skip
    evaluation = compare_rankings({"Raw": ranking, "DeepEMD": ranking}, labels)
    (row,) = gallery_rows(evaluation, shuffled, shuffled, [5], neighbours=1)
    assert row.label == f"class {labels[5]}"
    assert int(row.query[0, 0, 0]) // 3 == order[5]
    assert int(row.before[0].image[0, 0, 0]) // 3 == order[6]


def fixed_boxes(image):
    return pyramid_boxes((2, 1))


def test_matches_show_where_the_nodes_of_each_image_lie(evaluation, side):
    def boxes(image):
        return pyramid_boxes((2, 1)) * (0.5 + np.asarray(image).mean() / 255)

    (picture,) = match_pictures(
        evaluation, side, side, [0], matcher=EMDMatcher(), boxes=boxes, view=np.asarray
    )
    for pixels, places in (
        (picture.query, picture.boxes),
        (picture.reference, picture.reference_boxes),
    ):
        assert np.allclose(places, boxes(pixels).numpy())
    assert not np.allclose(picture.boxes, picture.reference_boxes)


def test_matches_show_right_answers_only(evaluation, side):
    matcher, boxes = EMDMatcher(), pyramid_boxes((2, 1))
    pictures = match_pictures(
        evaluation, side, side, [28, 0, 4, 8], matcher=matcher, boxes=lambda _: boxes,
        view=np.asarray, most=2,
    )  # fmt: skip
    assert [picture.title.split(":")[0] for picture in pictures] == ["class 0", "class 1"]
    answer = int(evaluation.rankings["DeepEMD"].rows[0, 0])
    match = matcher.match(side.features.nodes[0], side.features.nodes[answer])
    assert pictures[0].similarity == pytest.approx(match.similarity.item())
    assert np.array_equal(pictures[0].flow, match.flow.numpy())
    assert (pictures[0].reference == 3 * answer).all()


def test_files(evaluation, side, tmp_path):
    arguments = {"matcher": EMDMatcher(), "view": np.asarray}
    names = save_pictures(evaluation, side, side, tmp_path / "a", boxes=fixed_boxes, **arguments)
    assert names == ("gallery.png", "matches.png")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == list(names)
    names = save_pictures(evaluation, side, side, tmp_path / "b", boxes=lambda _: None, **arguments)
    assert names == ("gallery.png",)
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["gallery.png"]


def test_no_match_picture_where_no_first_answer_is_right(side, tmp_path):
    ranking = rank(["000"] * len(LABELS))
    evaluation = compare_rankings({"Raw": ranking, "DeepEMD": ranking}, torch.from_numpy(LABELS))
    names = save_pictures(
        evaluation, side, side, tmp_path, matcher=EMDMatcher(), boxes=fixed_boxes,
        view=np.asarray,
    )  # fmt: skip
    assert names == ("gallery.png",)
