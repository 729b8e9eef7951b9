"""Episodes: what is drawn from where, that it repeats, and what is refused."""

from __future__ import annotations

import pytest
import torch

from emd_retrieval.fewshot import Episodes, draw_episodes

LABELS = torch.arange(7).repeat(25)[torch.randperm(175, generator=torch.Generator().manual_seed(3))]


def test_classes_and_images_are_drawn_without_replacement() -> None:
    episodes = draw_episodes(LABELS, way=5, shot=3, queries=4, count=200, seed=1)
    assert episodes.support.shape == (200, 5, 3)
    assert episodes.query.shape == (200, 5, 4)
    rows = torch.cat([episodes.support, episodes.query], dim=2)
    assert bool((LABELS[rows] == episodes.classes[..., None]).all())
    for images, classes in zip(rows, episodes.classes, strict=True):
        assert len(images.unique()) == 35
        assert len(classes.unique()) == 5
    assert rows.unique().tolist() == list(range(175)), "200 episodes should meet every image"


def test_draws_are_even() -> None:
    """Each of 7 classes is in 5/7 of the episodes; each image of a class as often as any other."""
    episodes = draw_episodes(LABELS, way=5, shot=1, queries=4, count=3000)
    classes = torch.bincount(episodes.classes.flatten(), minlength=7) / 3000
    assert (classes - 5 / 7).abs().max() < 0.04
    images = torch.bincount(episodes.support.flatten(), minlength=175) / 3000
    assert (images - 5 / 7 / 25).abs().max() < 0.015


def test_the_seed_decides_and_more_episodes_begin_with_fewer() -> None:
    few, many = (draw_episodes(LABELS, count=count, queries=3, seed=5) for count in (70, 200))
    other = draw_episodes(LABELS, count=70, queries=3, seed=6)
    assert torch.equal(few.support, many.support[:70])
    assert torch.equal(few.query, many.query[:70])
    assert not torch.equal(few.support, other.support)


def test_query_labels_follow_the_flattened_queries() -> None:
    episodes = draw_episodes(LABELS, way=3, queries=4, count=2)
    classes = LABELS[episodes.query.flatten(1)]
    assert torch.equal(classes, episodes.classes.gather(1, episodes.query_labels.expand(2, -1)))
    assert len(episodes.at(slice(1, 2))) == 1


def test_labels_need_not_start_at_zero_and_classes_may_differ_in_size() -> None:
    labels = torch.tensor([9] * 4 + [2] * 9 + [40] * 5)
    episodes = draw_episodes(labels.numpy(), way=3, shot=1, queries=3, count=50)
    assert episodes.classes.unique().tolist() == [2, 9, 40]
    assert bool((labels[episodes.query] == episodes.classes[..., None]).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": 8}, r"way: expected at most 7, the classes of the collection, got 8"),
        ({"shot": 20, "queries": 15}, r"at least 35 images in every class .*class 0 with 25.*more"),
        ({"shot": 0}, "shot: expected 1 or more, got 0"),
        ({"count": 0}, "count: expected 1 or more"),
        ({"queries": -1}, "queries: expected 1 or more"),
    ],
)
def test_impossible_episodes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_episodes(LABELS, **{"count": 3, **change})


def test_a_small_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"too small: class 1 with 2. Lower shot or queries"):
        draw_episodes(torch.tensor([0] * 9 + [1] * 2 + [2] * 9), way=2, queries=4, count=1)


def test_wrong_types_and_shapes() -> None:
    with pytest.raises(TypeError, match="labels: expected integers"):
        draw_episodes(torch.rand(20), count=1)
    rows = torch.zeros(2, 5, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="query: expected shape"):
        Episodes(rows[..., 0], rows, rows[:1])
