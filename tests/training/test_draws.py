import pickle

import pytest
import torch

from emd_retrieval.training.draws import BatchDraw, generator_of, split_classes

LABELS = torch.tensor([0] * 5 + [1] * 3 + [2] * 7 + [3] * 4)


def draw(**changes):
    settings = {"batch_size": 8, "images_per_class": 4, "seed": 0, **changes}
    return BatchDraw(LABELS, **settings)


def test_a_batch_has_p_classes_of_k_images():
    batches = draw()
    for number in range(30):
        rows = batches.rows(number)
        classes, counts = LABELS[rows].unique(return_counts=True)
        assert counts.tolist() == [4, 4]
        for label in classes.tolist():
            distinct = rows[LABELS[rows] == label].unique()
            assert len(distinct) == min(4, int((label == LABELS).sum()))


def test_a_batch_depends_on_seed_and_number_alone():
    one, other = draw(), draw()
    other.rows(7)
    assert torch.equal(one.rows(3), other.rows(3))
    assert torch.equal(one.views(3, 5), other.views(3, 5))
    assert not torch.equal(one.rows(3), one.rows(4))
    assert not torch.equal(one.rows(3), draw(seed=1).rows(3))


def test_plain_batches_pass_through_all_images_in_turn():
    batches = draw(batch_size=4, images_per_class=1)
    rows = torch.cat([batches.rows(number) for number in range(len(LABELS))])
    for epoch in rows.split(len(LABELS)):
        assert epoch.sort().values.tolist() == list(range(len(LABELS)))


@pytest.mark.parametrize("images_per_class", [1, 4])
def test_a_draw_travels_to_worker_processes(images_per_class):
    batches = draw(images_per_class=images_per_class)
    travelled = pickle.loads(pickle.dumps(batches))  # noqa: S301 (made here)
    assert torch.equal(travelled.rows(5), batches.rows(5))


def test_every_view_is_drawn():
    views = torch.cat([draw().views(number, 3) for number in range(20)])
    assert views.bincount(minlength=3).min() > 30


def test_too_few_classes():
    with pytest.raises(ValueError, match=r"20 images of 4 a class need 5 classes .* got 4"):
        draw(batch_size=20)


def test_folds_are_disjoint_and_cover_all_classes():
    held_out = []
    for fold in range(4):
        kept, out = split_classes(10, folds=4, fold=fold, seed=3)
        assert sorted([*kept.tolist(), *out.tolist()]) == list(range(10))
        held_out += out.tolist()
    assert sorted(held_out) == list(range(10))
    assert not torch.equal(split_classes(10, folds=4, fold=0, seed=4)[1], out)
    assert split_classes(10, folds=0, fold=0, seed=0)[0].tolist() == list(range(10))
    with pytest.raises(ValueError, match="2 training classes cannot be divided into 2 folds"):
        split_classes(2, folds=2, fold=0, seed=0)
    with pytest.raises(ValueError, match="3 training classes cannot be divided into 2 folds"):
        split_classes(3, folds=2, fold=0, seed=0)
    with pytest.raises(ValueError, match="4 training classes cannot be divided into 5 folds"):
        split_classes(4, folds=5, fold=0, seed=0)
    assert len(split_classes(3, folds=2, fold=1, seed=0)[0]) == 2


def test_generators_tell_their_parts_apart():
    def first(*parts):
        return int(torch.randint(2**31, (), generator=generator_of(*parts)))

    assert len({first("a", 1, 2), first("a", 2, 1), first("a", 12), first("b", 1, 2)}) == 4
