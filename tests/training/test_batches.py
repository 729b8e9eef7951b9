import itertools

import pytest
import torch

from emd_retrieval.training import ImageBatches

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def birds(generator, counts=(5, 4, 7, 2)):
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    images = torch.randint(256, (len(labels), 3, 8, 8), generator=generator, dtype=torch.uint8)
    return images, labels


def test_a_batch_has_p_classes_of_k_images(generator):
    images, labels = birds(generator)
    batches = ImageBatches(images, labels, classes_per_batch=3, images_per_class=4, **PLAIN)
    for pixels, of in itertools.islice(batches, 20):
        assert pixels.shape == (12, 3, 8, 8)
        classes, counts = of.unique(return_counts=True)
        assert len(classes) == 3
        assert counts.tolist() == [4, 4, 4]


def test_images_of_a_class_are_distinct_while_there_are_enough(generator):
    labels = torch.tensor([0] * 6 + [1] * 6)
    # One grey value an image, so that each can be told after flips.
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 4)
    batches = ImageBatches(images, labels, classes_per_batch=2, images_per_class=5, **PLAIN)
    for pixels, _ in itertools.islice(batches, 10):
        assert len(pixels[:, 0, 0, 0].unique()) == 10


def test_the_seed_decides(generator):
    images, labels = birds(generator)

    def first(seed):
        batches = ImageBatches(
            images, labels, classes_per_batch=2, images_per_class=2, shift=0.2, seed=seed, **PLAIN
        )
        return next(iter(batches))[0]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_normalises(generator):
    images = torch.full((4, 3, 6, 6), 255, dtype=torch.uint8)
    batches = ImageBatches(
        images,
        torch.tensor([0, 0, 1, 1]),
        classes_per_batch=2,
        images_per_class=2,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    pixels, _ = next(iter(batches))
    torch.testing.assert_close(pixels, torch.full_like(pixels, 2.0))


def test_shift_moves_within_bounds(generator):
    images = torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    images[:, :, 5, 5] = 255
    batches = ImageBatches(
        images, torch.tensor([0, 1]), classes_per_batch=2, images_per_class=1, shift=0.2, **PLAIN
    )
    seen = set()
    for pixels, _ in itertools.islice(batches, 60):
        for image in pixels:
            row, column = (int(i) for i in (image[0] == 1).nonzero()[0])
            assert abs(row - 5) <= 2
            assert min(abs(column - 5), abs(column - 4)) <= 2, "flipped, then moved by at most 2"
            seen.add((row, column))
    assert len(seen) > 10


def test_refuses_bad_input(generator):
    images, labels = birds(generator)
    with pytest.raises(ValueError, match=r"classes_per_batch: expected 2 to 4 .* got 5"):
        ImageBatches(images, labels, classes_per_batch=5, images_per_class=2, **PLAIN)
    with pytest.raises(ValueError, match="one class alone has no negatives"):
        ImageBatches(images, labels, classes_per_batch=1, images_per_class=2, **PLAIN)
    with pytest.raises(ValueError, match=r"labels: expected shape \[n\], with n = 18, got \[3\]"):
        ImageBatches(images, labels[:3], classes_per_batch=2, images_per_class=2, **PLAIN)
