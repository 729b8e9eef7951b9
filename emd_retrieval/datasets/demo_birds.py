"""The built-in demo set: procedurally drawn birds of many species, for a run without any data.

As in CUB, species share their build and differ in a few local parts, each of which several species
share; tone of plumage, pose, perch, flowers and light vary within a species. The drawing itself is
in :mod:`emd_retrieval.datasets.bird_drawing`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from emd_retrieval.datasets.base import ImageCollection
from emd_retrieval.datasets.bird_drawing import PARTS, BirdSpecies, draw_bird
from emd_retrieval.progress import progress

_GENUS_SIZE = 5
_CHANGED_PARTS = 2
_LEAST_DIFFERENCES = 2
_MOST_SPECIES = 1000
_NOUNS = {"cone": "Finch", "thin": "Warbler", "hooked": "Shrike", "long": "Sunbird"}


def demo_species(num_species: int = 40, seed: int = 0) -> tuple[BirdSpecies, ...]:
    """Make up species: genera of five whose members differ from their kin in two to four parts.

    Args:
        num_species: How many, 1 to 1000.
        seed: Another seed gives other species.

    Returns:
        Different species in random order, any two of which differ in two parts or more.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 1 <= num_species <= _MOST_SPECIES:
        raise ValueError(f"num_species: expected 1 to {_MOST_SPECIES}, got {num_species}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    rng = np.random.default_rng([seed, 0])
    species: list[BirdSpecies] = []
    while len(species) < num_species:
        if len(species) % _GENUS_SIZE == 0:
            genus = BirdSpecies(**{part: str(rng.choice(PARTS[part])) for part in PARTS})
        changed = rng.choice(list(PARTS), _CHANGED_PARTS, replace=False)
        member = replace(genus, **{part: str(rng.choice(PARTS[part])) for part in changed})
        if all(_differences(member, other) >= _LEAST_DIFFERENCES for other in species):
            species.append(member)
    return tuple(species[i] for i in rng.permutation(num_species))


def demo_birds(
    num_species: int = 40, images_per_species: int = 20, *, size: int = 96, seed: int = 0
) -> ImageCollection:
    """Draw the demo set.

    Each image has its own random stream, so that drawing more of a species keeps the first ones.

    Args:
        num_species: Number of classes, 1 to 1000.
        images_per_species: Images in each class.
        size: Side of an image in pixels, at least 16.
        seed: The same seed gives the same species and images.

    Returns:
        A collection in memory, classes numbered from 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> birds = demo_birds(num_species=3, images_per_species=2, size=64)
        >>> birds.images.shape, birds.labels.tolist()
        ((6, 64, 64, 3), [0, 0, 1, 1, 2, 2])
    """
    if images_per_species < 1:
        raise ValueError(f"images_per_species: expected at least 1, got {images_per_species}")
    species = demo_species(num_species, seed)
    jobs = [(kind, image) for kind in range(num_species) for image in range(images_per_species)]
    images = np.stack(
        [
            draw_bird(species[kind], np.random.default_rng([seed, 1, kind, image]), size)
            for kind, image in progress(jobs, "drawing birds", unit="image")
        ]
    )
    return ImageCollection(
        name="demo birds",
        images=images,
        labels=np.repeat(np.arange(num_species), images_per_species),
        class_names=tuple(f"{n:03d}.{_name(kind)}" for n, kind in enumerate(species, start=1)),
        class_numbers=tuple(range(1, num_species + 1)),
        settings={
            "num_species": num_species,
            "images_per_species": images_per_species,
            "size": size,
            "seed": seed,
        },
    )


def _differences(one: BirdSpecies, other: BirdSpecies) -> int:
    return sum(getattr(one, part) != getattr(other, part) for part in PARTS)


def _name(species: BirdSpecies) -> str:
    """A field guide's name, such as ``White_browed_Spotted_Finch``; species may share one."""
    paint, _, kind = species.head.partition(" ")
    head = f"{paint}_{'capped' if kind == 'cap' else kind.rstrip('e') + 'ed'}" if kind else "plain"
    paint, _, kind = species.breast.partition(" ")
    breast = {"spots": "Spotted", "streaks": "Streaked"}.get(paint, "")
    if kind:
        breast = f"{paint.capitalize()}_{'throated' if kind == 'bib' else 'banded'}"
    return "_".join(filter(None, [head.capitalize(), breast, _NOUNS[species.bill]]))
