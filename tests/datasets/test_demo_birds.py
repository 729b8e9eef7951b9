"""The demo set: the same seed gives the same birds, species differ in parts and each part shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from emd_retrieval.datasets import (
    BirdSpecies,
    demo_birds,
    demo_species,
    draw_bird,
    load_images,
    save_image_folder,
)
from emd_retrieval.datasets.bird_drawing import PARTS


def differences(one: BirdSpecies, other: BirdSpecies) -> int:
    return sum(getattr(one, part) != getattr(other, part) for part in PARTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_species_share_parts_and_differ_in_some(seed: int) -> None:
    species = demo_species(40, seed)
    assert len(species) == 40
    nearest = [min(differences(one, b) for b in species if b is not one) for one in species]
    assert min(nearest) >= 2
    # Each has close kin, so that few parts decide.
    assert np.mean(nearest) <= 4
    for part in PARTS:
        counts = Counter(getattr(one, part) for one in species)
        assert len(counts) >= 3
        assert max(counts.values()) <= 30


def test_species_depend_on_the_seed_only() -> None:
    assert demo_species(12, 3) == demo_species(12, 3)
    assert demo_species(12, 3) != demo_species(12, 4)


def test_collection() -> None:
    birds = demo_birds(4, 3, size=48, seed=2)
    assert birds.images.shape == (12, 48, 48, 3)
    assert birds.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert birds.class_names[0].startswith("001.")
    assert birds.describe()["settings"] == {
        "num_species": 4,
        "images_per_species": 3,
        "size": 48,
        "seed": 2,
    }
    again = demo_birds(4, 3, size=48, seed=2)
    np.testing.assert_array_equal(again.images, birds.images)
    assert again.describe() == birds.describe()
    assert not np.array_equal(demo_birds(4, 3, size=48, seed=5).images, birds.images)


def test_more_images_keep_the_first_ones() -> None:
    few, many = demo_birds(2, 2, size=32), demo_birds(2, 4, size=32)
    np.testing.assert_array_equal(many.images[[0, 1, 4, 5]], few.images)


def test_images_vary_within_a_species() -> None:
    birds = demo_birds(1, 6, size=48)
    flat = birds.images.reshape(6, -1).astype(float)
    apart = np.abs(flat[:, None] - flat[None]).mean(-1)
    assert apart[~np.eye(6, dtype=bool)].min() > 10


PLAIN = BirdSpecies("plain", "plain", "thin", "black", "plain", "plain", "square", "plain", "black")


@pytest.mark.parametrize(
    ("part", "value"), [(part, value) for part in PARTS for value in PARTS[part]]
)
def test_every_part_shows_and_stays_local(part: str, value: str) -> None:
    changed = replace(PLAIN, **{part: value})
    differing = []
    for seed in range(4):
        one = draw_bird(PLAIN, np.random.default_rng(seed), 96).astype(int)
        other = draw_bird(changed, np.random.default_rng(seed), 96).astype(int)
        differing.append(float((np.abs(one - other).max(-1) > 24).mean()))
    if changed == PLAIN:
        assert max(differing) == 0
    else:
        # The share of the picture that tells the two species apart.
        assert 0.0008 < np.mean(differing) < 0.08


def test_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_species: expected 1 to 1000, got 0"):
        demo_birds(0)
    with pytest.raises(ValueError, match="images_per_species: expected at least 1, got 0"):
        demo_birds(2, 0)
    with pytest.raises(ValueError, match="size: expected at least 16 pixels, got 8"):
        demo_birds(2, 2, size=8)
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        demo_species(4, -1)
    with pytest.raises(ValueError, match=r"expected wing to be one of .*; got 'three bars'"):
        draw_bird(replace(PLAIN, wing="three bars"), np.random.default_rng(0))


def test_export_reads_back_as_the_same_classes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    birds = demo_birds(3, 2, size=32)
    read = load_images(save_image_folder(birds, tmp_path / "birds"))
    assert read.class_names == birds.class_names
    assert read.labels.tolist() == birds.labels.tolist()
    np.testing.assert_array_equal(
        np.stack([np.asarray(read.load(i)) for i in range(6)]), birds.images
    )
