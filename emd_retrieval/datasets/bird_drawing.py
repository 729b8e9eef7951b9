"""Draws one small bird on its perch: anatomy, plumage, pose, surroundings and light.

What makes a species and which birds a demo set holds is :mod:`emd_retrieval.datasets.demo_birds`'s
affair. Only numpy's Generator and OpenCV's fixed-point drawing are used, so one seed gives one
picture on every platform, up to the last bit of a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Pixels = NDArray[np.uint8]
Colour = tuple[float, float, float]

# Bird coordinates: the bird looks along +x, y points down, the trunk is about 1 long.
_SUPERSAMPLING = 2
_SUBPIXEL_BITS = 4

PAINTS: dict[str, Colour] = {
    "black": (38, 34, 36),
    "white": (240, 238, 230),
    "yellow": (238, 196, 44),
    "rufous": (150, 72, 36),
    "red": (196, 44, 38),
    "blue": (64, 104, 176),
    "orange": (232, 132, 40),
    "pink": (214, 146, 132),
}


@dataclass(frozen=True)
class BirdSpecies:
    """The local parts that tell one species from another; all else varies from bird to bird.

    Every field is one of the keys of :data:`PARTS`' entry of the same name.
    """

    head: str
    eye: str
    bill: str
    bill_colour: str
    breast: str
    wing: str
    tail: str
    tail_mark: str
    legs: str


PARTS: dict[str, tuple[str, ...]] = {
    "head": (
        "plain",
        "black cap",
        "rufous cap",
        "yellow cap",
        "white brow",
        "yellow brow",
        "black mask",
        "white cheek",
        "rufous cheek",
        "red crest",
        "black crest",
    ),
    "eye": ("plain", "white ring", "yellow ring", "red ring"),
    "bill": ("cone", "thin", "hooked", "long"),
    "bill_colour": ("black", "yellow", "orange"),
    "breast": (
        "plain",
        "spots",
        "streaks",
        "black band",
        "rufous band",
        "yellow bib",
        "red bib",
        "black bib",
    ),
    "wing": ("plain", "one white bar", "two white bars", "two yellow bars", "white patch"),
    "tail": ("square", "forked", "round", "long"),
    "tail_mark": ("plain", "white tip", "white edge", "black band", "yellow tip"),
    "legs": ("black", "pink", "orange"),
}


def _curve(points: Sequence[tuple[float, float]], closed: bool = True, steps: int = 6) -> Points:
    """A Catmull-Rom curve through points. Shape: ``[k, 2]``."""
    p = np.asarray(points, dtype=np.float64)
    if closed:
        p = np.concatenate([p[-1:], p, p[:2]])
    else:
        p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-2:-1]])


_TRUNK = _curve(
    [
        (0.55, -0.24),
        (0.53, -0.04),
        (0.43, 0.14),
        (0.22, 0.27),
        (-0.04, 0.29),
        (-0.30, 0.19),
        (-0.54, 0.06),
        (-0.54, -0.05),
        (-0.32, -0.16),
        (-0.05, -0.26),
        (0.16, -0.37),
        (0.34, -0.46),
    ]
)
_BELLY = _curve(
    [
        (0.62, -0.20),
        (0.58, 0.04),
        (0.45, 0.22),
        (0.2, 0.36),
        (-0.1, 0.38),
        (-0.5, 0.16),
        (-0.4, 0.08),
        (-0.05, 0.10),
        (0.22, 0.02),
        (0.38, -0.14),
    ]
)
_HEAD = _curve(
    [
        (0.205, 0.03),
        (0.175, -0.09),
        (0.08, -0.175),
        (-0.05, -0.185),
        (-0.165, -0.11),
        (-0.215, 0.03),
        (-0.17, 0.17),
        (-0.03, 0.20),
        (0.12, 0.15),
        (0.185, 0.09),
    ]
)
_HEAD_CENTRE = (0.40, -0.37)
_EYE = (0.085, -0.035)
_HEAD_MARKS = {
    "cap": _curve(
        [
            (0.24, -0.02),
            (0.14, -0.065),
            (0.0, -0.06),
            (-0.14, -0.02),
            (-0.26, 0.06),
            (-0.3, -0.2),
            (-0.05, -0.3),
            (0.2, -0.2),
        ]
    ),
    "brow": _curve(
        [
            (0.23, -0.03),
            (0.16, -0.08),
            (0.08, -0.1),
            (-0.04, -0.085),
            (-0.2, 0.005),
            (-0.21, -0.045),
            (-0.06, -0.13),
            (0.09, -0.142),
            (0.18, -0.105),
        ]
    ),
    "mask": _curve(
        [
            (0.24, -0.015),
            (0.12, -0.085),
            (0.0, -0.075),
            (-0.17, -0.01),
            (-0.16, 0.06),
            (0.0, 0.045),
            (0.13, 0.045),
            (0.24, 0.06),
        ]
    ),
    "cheek": _curve(
        [(0.11, 0.06), (0.0, 0.02), (-0.11, 0.03), (-0.14, 0.09), (-0.06, 0.155), (0.06, 0.13)]
    ),
}
_CREST = _curve(
    [
        (0.13, -0.13),
        (0.04, -0.23),
        (-0.12, -0.31),
        (-0.30, -0.33),
        (-0.19, -0.22),
        (-0.19, -0.08),
        (-0.06, -0.12),
    ]
)
_BILLS = {
    "cone": _curve(
        [(0.15, -0.055), (0.24, -0.045), (0.335, 0.055), (0.25, 0.095), (0.15, 0.115)], steps=4
    ),
    "thin": _curve(
        [(0.16, -0.015), (0.26, 0.01), (0.385, 0.045), (0.27, 0.06), (0.16, 0.075)], steps=4
    ),
    "hooked": _curve(
        [(0.15, -0.05), (0.27, -0.04), (0.36, 0.02), (0.352, 0.095), (0.315, 0.065), (0.16, 0.10)],
        steps=4,
    ),
    "long": _curve(
        [
            (0.16, -0.015),
            (0.32, 0.0),
            (0.47, 0.065),
            (0.54, 0.135),
            (0.44, 0.09),
            (0.31, 0.05),
            (0.16, 0.075),
        ],
        steps=4,
    ),
}
# Where the line between the mandibles ends, and its height at the root.
_BILL_GAPE = {
    "cone": (0.30, 0.045),
    "thin": (0.34, 0.04),
    "hooked": (0.32, 0.04),
    "long": (0.44, 0.06),
}
_BREAST_BAND = _curve(
    [(0.60, -0.12), (0.6, 0.02), (0.40, 0.05), (0.2, -0.02), (0.22, -0.12), (0.42, -0.06)]
)
_BIB = _curve(
    [(0.26, 0.07), (0.14, 0.085), (0.02, 0.15), (0.0, 0.27), (0.09, 0.35), (0.22, 0.33), (0.3, 0.2)]
)
# Where breast marks sit: rows across the breast from the throat to the flank, cut by the wing.
_BREAST_GRID = np.array(
    [
        (0.53 - 0.105 * row + 0.035 * (column % 2), -0.12 + 0.075 * column + 0.02 * row)
        for row in range(6)
        for column in range(6)
    ]
)
# The folded wing between two curves from the shoulder to the tip.
_WING_UPPER = _curve(
    [(0.27, -0.17), (0.14, -0.27), (-0.06, -0.27), (-0.30, -0.19), (-0.52, -0.07), (-0.70, 0.05)],
    closed=False,
)
_WING_LOWER = _curve(
    [(0.27, -0.17), (0.24, -0.02), (0.07, 0.10), (-0.17, 0.12), (-0.44, 0.09), (-0.70, 0.05)],
    closed=False,
)
# length, half-width at the base and at the tip, and how the length falls off to the sides
_TAILS = {
    "square": (0.47, 0.065, 0.10, 0.0),
    "forked": (0.54, 0.065, 0.13, -0.36),
    "round": (0.42, 0.065, 0.19, 0.22),
    "long": (0.78, 0.06, 0.085, 0.42),
}
_PLUMAGES: tuple[tuple[Colour, Colour], ...] = (  # back, belly
    ((124, 104, 80), (206, 192, 166)),
    ((112, 116, 92), (202, 204, 172)),
    ((116, 118, 124), (206, 206, 204)),
    ((142, 118, 92), (216, 200, 176)),
    ((98, 96, 92), (194, 190, 180)),
    ((132, 126, 100), (212, 206, 176)),
)
_BACKDROPS: tuple[tuple[Colour, Colour], ...] = (  # above, below
    ((188, 210, 226), (134, 158, 112)),
    ((206, 216, 214), (118, 138, 96)),
    ((160, 186, 150), (84, 112, 70)),
    ((214, 204, 180), (146, 132, 92)),
    ((172, 196, 220), (182, 166, 122)),
    ((128, 154, 118), (66, 88, 60)),
)
_LEAVES: tuple[Colour, ...] = (
    (96, 132, 60),
    (70, 108, 52),
    (132, 152, 66),
    (160, 140, 58),
    (166, 92, 44),
    (84, 120, 84),
)
_LEAF = _curve([(0, 0), (0.3, 0.2), (0.7, 0.17), (1.0, 0), (0.7, -0.17), (0.3, -0.2)], steps=4)
_BARKS: tuple[Colour, ...] = ((104, 82, 62), (88, 76, 66), (126, 104, 82), (112, 108, 102))
_BLOSSOMS = ("white", "yellow", "red", "orange", "blue", "white")
_BERRIES = ("red", "orange", "black", "yellow", "white", "red")


class _Frame:
    """Maps a part's coordinates to pixels: scale, turn (and mirror), then shift.

    ``unit`` is the number of pixels in a unit of length.
    """

    def __init__(self, matrix: Points, origin: Points) -> None:
        self.matrix = matrix
        self.origin = origin
        (a, b), (c, d) = matrix.tolist()
        self.unit = abs(a * d - b * c) ** 0.5

    def __call__(self, points: Any) -> Points:
        return np.asarray(points, dtype=np.float64) @ self.matrix.T + self.origin

    def part(self, at: tuple[float, float], degrees: float, mirror: bool = False) -> _Frame:
        """The frame of a part that hangs at ``at``, turned by ``degrees`` (clockwise)."""
        return _Frame(self.matrix @ _turn(degrees, mirror), self(at))


@dataclass(frozen=True)
class _Perch:
    frame: _Frame
    girth: float


def _turn(degrees: float, mirror: bool = False) -> Points:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s], [s, c]])
    return turn * (-1.0, 1.0) if mirror else turn


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.rint(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)


def _fill(image: Pixels, points: Points, colour: Any) -> None:
    cv2.fillPoly(image, [_fixed(points)], colour, cv2.LINE_AA, _SUBPIXEL_BITS)


def _line(image: Pixels, points: Points, colour: Any, width: float, closed: bool = False) -> None:
    thick = max(1, round(width))
    cv2.polylines(image, [_fixed(points)], closed, colour, thick, cv2.LINE_AA, _SUBPIXEL_BITS)


def _dot(image: Pixels, centre: Points, radius: float, colour: Any) -> None:
    x, y = _fixed(centre).tolist()
    r = max(1, round(radius * (1 << _SUBPIXEL_BITS)))
    cv2.circle(image, (x, y), r, colour, -1, cv2.LINE_AA, _SUBPIXEL_BITS)


def _mix(a: Sequence[float], b: Sequence[float], t: float) -> Colour:
    return (a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2]))


def _shade(colour: Sequence[float], factor: float) -> Colour:
    return (
        min(255.0, colour[0] * factor),
        min(255.0, colour[1] * factor),
        min(255.0, colour[2] * factor),
    )


def _blend(image: Pixels, stencil: Pixels, colour: Colour, box: tuple[slice, slice]) -> None:
    """Lay a colour over the box of an image, as opaque as the stencil of the box says."""
    part = image[box].astype(np.int32)
    opacity = stencil.astype(np.int32)[..., None]
    image[box] = part + ((np.array(colour, dtype=np.int32) - part) * opacity) // 255


def _resized(image: Pixels, side: int, interpolation: int) -> Pixels:
    return np.asarray(cv2.resize(image, (side, side), interpolation=interpolation), np.uint8)


def _blurred(image: Pixels, width: int) -> Pixels:
    return np.asarray(cv2.blur(image, (width, width)), np.uint8)


def _box(points: Points, size: int, margin: float = 2) -> tuple[slice, slice]:
    low = np.clip(np.floor(points.min(0) - margin), 0, size).astype(int).tolist()
    high = np.clip(np.ceil(points.max(0) + margin), 0, size).astype(int).tolist()
    return slice(low[1], high[1]), slice(low[0], high[0])


def draw_bird(species: BirdSpecies, rng: np.random.Generator, size: int = 128) -> Pixels:
    """Draw one bird of a species in a pose, place and light of its own.

    Args:
        species: The parts to draw.
        rng: Where pose, plumage tone, surroundings, light and noise come from.
        size: Side of the picture in pixels, at least 16.

    Returns:
        An RGB image. Shape: ``[size, size, 3]``.

    Raises:
        ValueError: If ``size`` is below 16 or the species has a part that is not in :data:`PARTS`.
    """
    if size < 16:
        raise ValueError(f"size: expected at least 16 pixels, got {size}")
    for part, choices in PARTS.items():
        if getattr(species, part) not in choices:
            raise ValueError(
                f"species: expected {part} to be one of {', '.join(choices)}; "
                f"got {getattr(species, part)!r}"
            )
    side = size * _SUPERSAMPLING
    image = _backdrop(rng, side)
    mask = np.zeros((side, side), np.uint8)
    upright, pitch = _pose(rng, side)
    _draw_flowers(image, rng, upright.unit)
    perch = _draw_branches(image, rng, upright, pitch)
    _draw_bird(image, mask, species, rng, upright, pitch, perch)
    _draw_toes(image, species, perch)
    small, small_mask = (_resized(layer, size, cv2.INTER_AREA) for layer in (image, mask))
    return _light(small, small_mask, rng, upright.unit / _SUPERSAMPLING)


def _backdrop(rng: np.random.Generator, side: int) -> Pixels:
    """Out-of-focus sky, foliage and ground: what a long lens leaves of a background."""
    coarse = 48
    above, below = _BACKDROPS[rng.integers(len(_BACKDROPS))]
    horizon = rng.uniform(0.25, 0.95)
    ramp = np.clip((np.linspace(0, 1, coarse) - horizon) / 0.35 + 0.5, 0, 1)[:, None, None]
    field = np.array(above) * (1 - ramp) + np.array(below) * ramp
    blur = np.ascontiguousarray(np.broadcast_to(field, (coarse, coarse, 3)).astype(np.uint8))
    blobs = int(rng.integers(8, 18))
    for x, y, r, kind, tone in rng.random((blobs, 5)):
        colour = _mix(below, _LEAVES[int(kind * len(_LEAVES))], 0.6)
        if kind < 0.12:
            colour = PAINTS[_BLOSSOMS[int(tone * 4)]]
        centre = np.array([x, y]) * coarse
        _dot(blur, centre, (0.02 + 0.09 * r) * coarse, _shade(colour, 0.7 + 0.6 * tone))
    k = int(rng.integers(2, 5)) * 2 + 1
    return _resized(_blurred(_blurred(blur, k), k), side, cv2.INTER_CUBIC)


def _pose(rng: np.random.Generator, side: int) -> tuple[_Frame, float]:
    """The upright frame of the bird (scaled, shifted, perhaps mirrored) and its pitch."""
    scale = side * rng.uniform(0.38, 0.54)
    centre = side * (np.array([0.5, 0.47]) + rng.uniform(-1, 1, 2) * (0.09, 0.07))
    roll = _turn(rng.uniform(-8, 8), bool(rng.random() < 0.5))
    return _Frame(scale * roll, centre), float(rng.uniform(8, 48))


def _draw_branches(image: Pixels, rng: np.random.Generator, frame: _Frame, pitch: float) -> _Perch:
    """Draw the perch below the bird's feet, and a few twigs."""
    bark = _shade(_BARKS[rng.integers(len(_BARKS))], rng.uniform(0.8, 1.2))
    hip = _turn(-pitch) @ (0.04, 0.26)
    perch = frame.part((hip[0], hip[1] + 0.2), rng.uniform(-16, 16))
    girth = rng.uniform(0.07, 0.11)
    for at, angle, reach, tone in rng.random((int(rng.integers(1, 4)), 4)):
        # From 25 to 75 degrees off the perch, up or down.
        twig = perch.part(
            (2.2 * at - 1.1, 0.0), (50 * abs(2 * angle - 1) + 25) * (-1) ** (angle < 0.5)
        )
        length = 0.5 + 0.7 * reach
        _stick(image, rng, twig, (0, length), 0.35 * girth, _shade(bark, 0.75 + 0.3 * tone), 3)
    _stick(image, rng, perch, (-2.2, 2.2), girth, bark, 5)
    return _Perch(perch, girth)


def _stick(
    image: Pixels,
    rng: np.random.Generator,
    frame: _Frame,
    ends: tuple[float, float],
    girth: float,
    colour: Colour,
    growth: int,
) -> None:
    x = np.linspace(*ends, 9)
    bow = rng.uniform(-0.02, 0.02, 9) + rng.uniform(-0.03, 0.03) * x**2
    bow -= np.interp(0, x, bow)
    thick = girth * np.linspace(1.0, 0.75, 9) * rng.uniform(0.92, 1.08, 9) / 2
    upper, lower = np.stack([x, bow - thick], 1), np.stack([x, bow + thick], 1)
    _fill(image, frame(np.concatenate([upper, lower[::-1]])), colour)
    under = np.stack([x, bow + 0.35 * thick], 1)
    _fill(image, frame(np.concatenate([under, lower[::-1]])), _shade(colour, 0.68))
    _line(
        image,
        frame(np.stack([x, bow - 0.8 * thick], 1)),
        _shade(colour, 1.28),
        0.12 * girth * frame.unit,
    )
    for at, lateral, length in rng.random((3, 3)):
        start = ends[0] + (ends[1] - ends[0]) * at
        y = np.interp(start, x, bow) + (lateral - 0.5) * 0.6 * girth
        streak = frame([(start, y), (start + 0.08 + 0.12 * length, y + 0.01)])
        _line(image, streak, _shade(colour, 0.55), 1)
    for at, angle, long, kind, tone in rng.random((growth, 5)):
        start = ends[0] + (ends[1] - ends[0]) * at
        stalk = frame.part((start, float(np.interp(start, x, bow))), 20 + 320 * angle)
        if kind < 0.6:
            _draw_leaf(image, stalk, 0.14 + 0.2 * long, kind / 0.6, tone)
        elif kind < 0.85:
            _draw_berries(image, rng, stalk, tone)
        else:
            _draw_flower(image, stalk, 0.05 + 0.03 * long, tone)


def _draw_leaf(image: Pixels, frame: _Frame, length: float, kind: float, tone: float) -> None:
    colour = _shade(_LEAVES[int(kind * len(_LEAVES))], 0.75 + 0.5 * tone)
    _fill(image, frame(_LEAF * length), colour)
    _fill(image, frame(_LEAF[: len(_LEAF) // 2 + 1] * length), _shade(colour, 0.82))
    _line(image, frame([(0, 0), (length, 0)]), _shade(colour, 1.25), 1)


def _draw_flowers(image: Pixels, rng: np.random.Generator, unit: float) -> None:
    """Flowers that grow up from below, in the colours of the plumage and of its marks' size."""
    side = image.shape[0]
    for x, y, lean, radius, tone in rng.random((int(rng.integers(0, 4)), 5)):
        foot = np.array([side * (x + 0.3 * (lean - 0.5)), 1.05 * side])
        top = np.array([x, 0.25 + 0.65 * y]) * side
        stem = np.stack([foot, (foot + top) / 2 + side * 0.04 * (tone - 0.5), top])
        green = _shade(_LEAVES[0], 0.7 + 0.5 * lean)
        _line(image, stem, green, 0.02 * unit)
        for end, turn in ((0.35, -50.0), (0.6, -125.0)):
            at = stem[1] + (top - stem[1]) * end
            _draw_leaf(image, _Frame(unit * _turn(turn), at), 0.22, 0.1, lean)
        _draw_flower(image, _Frame(unit * _turn(360 * lean), top), 0.06 + 0.05 * radius, tone)


def _draw_flower(image: Pixels, frame: _Frame, radius: float, tone: float) -> None:
    paint = _BLOSSOMS[int(len(_BLOSSOMS) * tone)]
    colour = _shade(PAINTS[paint], 0.85 + 0.15 * (6 * tone % 1))
    angles = np.radians(72.0 * np.arange(5))
    centres = frame(radius * np.stack([np.cos(angles), np.sin(angles)], 1))
    for petal, centre in enumerate(centres):
        _dot(image, centre, 0.62 * radius * frame.unit, _shade(colour, 0.84 + 0.04 * petal))
    heart = PAINTS["yellow" if paint != "yellow" else "orange"]
    _dot(image, frame.origin, 0.45 * radius * frame.unit, heart)


def _draw_berries(image: Pixels, rng: np.random.Generator, frame: _Frame, tone: float) -> None:
    paint = _BERRIES[int(len(_BERRIES) * tone)]
    colour = _shade(PAINTS[paint], 0.85 + 0.2 * (6 * tone % 1))
    shine = _mix(colour, (255, 255, 255), 0.75)
    places = frame(rng.uniform((0.07, -0.09), (0.22, 0.09), (int(rng.integers(2, 7)), 2)))
    for place in places:
        _line(image, np.stack([frame.origin, place]), (92, 84, 58), 1)
    for place in places:
        _dot(image, place, 0.034 * frame.unit, colour)
        _dot(image, place - 0.012 * frame.unit, 0.009 * frame.unit, shine)


def _draw_bird(
    image: Pixels,
    mask: Pixels,
    species: BirdSpecies,
    rng: np.random.Generator,
    upright: _Frame,
    pitch: float,
    perch: _Perch,
) -> None:
    """Draw the bird from the far side to the near one; ``mask`` receives its outline."""
    back, belly = _PLUMAGES[rng.integers(len(_PLUMAGES))]
    tone = rng.uniform(0.88, 1.12)
    back, belly = _shade(back, tone), _shade(belly, tone)
    body = upright.part((0, 0), -pitch)
    head = body.part(_HEAD_CENTRE, pitch + rng.uniform(-16, 16), bool(rng.random() < 0.15))
    _draw_tail(image, mask, species, body.part((-0.44, 0.0), rng.uniform(-8, 10)), back)
    _draw_legs(image, species, body, perch)

    trunk, skull = body(_TRUNK), head(_HEAD)
    for outline in (trunk, skull):
        _fill(image, outline, back)
        _fill(mask, outline, 255)
    box = _box(np.concatenate([trunk, skull]), image.shape[0])
    soft = 2 * round(0.045 * body.unit) + 1
    _stain(image, mask, body(_BELLY), belly, box, soft)
    _draw_breast(image, mask, species.breast, body, head, rng, box)
    _draw_wing(image, mask, species.wing, body, back, box)
    _draw_head(image, mask, species, head, back, box)


def _stain(
    image: Pixels,
    clip: Pixels,
    outline: Points | Sequence[Points],
    colour: Colour,
    box: tuple[slice, slice],
    soft: int = 0,
) -> None:
    """Colour the inside of outlines where ``clip`` is set, with an edge ``soft`` pixels wide."""
    layer = np.zeros_like(clip)
    for points in [outline] if isinstance(outline, np.ndarray) else outline:
        _fill(layer, points, 255)
    stencil = layer[box]
    if soft > 1 and stencil.size:
        stencil = _blurred(stencil, soft)
    _blend(image, np.minimum(stencil, clip[box]), colour, box)


@cache
def _tail_area(
    tail: str, along: tuple[float, float], across: tuple[float, float], steps: int = 9
) -> Points:
    """A piece of a tail: ``along`` from base 0 to tip 1, ``across`` from edge -1 to edge 1."""
    length, base, tip, fall = _TAILS[tail]
    lateral = np.linspace(*across, steps)
    reach = length * (1 - fall * lateral**2)
    near, far = (np.stack([-at * reach, lateral * (base + (tip - base) * at)], 1) for at in along)
    return np.concatenate([near, far[::-1]])


def _draw_tail(
    image: Pixels, mask: Pixels, species: BirdSpecies, frame: _Frame, back: Colour
) -> None:
    def area(*piece: Any) -> Points:
        return frame(_tail_area(species.tail, *piece))

    whole = area((0, 1), (-1, 1))
    _fill(image, whole, _shade(back, 0.70))
    _fill(mask, whole, 255)
    for edge in (-2 / 3, 0.0, 2 / 3):
        _fill(image, area((0, 1), (edge, edge + 1 / 3), 3), _shade(back, 0.84))
    if species.tail_mark == "black band":
        _fill(image, area((0.62, 0.84), (-1, 1)), PAINTS["black"])
    elif species.tail_mark == "white edge":
        for sides in ((-1.0, -0.5), (0.5, 1.0)):
            _fill(image, area((0.12, 1), sides), PAINTS["white"])
    elif species.tail_mark != "plain":
        _fill(image, area((0.78, 1), (-1, 1)), PAINTS[species.tail_mark.split()[0]])
    for edge in (-0.5, 0.0, 0.5):
        _line(image, area((0.05, 0.98), (edge, edge), 1), _shade(back, 0.5), 1)


def _draw_legs(image: Pixels, species: BirdSpecies, body: _Frame, perch: _Perch) -> None:
    colour = PAINTS[species.legs]
    for hip, foot in (((-0.04, 0.24), -0.07), ((0.08, 0.22), 0.07)):
        shin = np.stack([body(hip), perch.frame((foot, -0.45 * perch.girth))])
        _line(image, shin, _shade(colour, 0.85), 0.035 * body.unit)
        _dot(image, body(hip), 0.05 * body.unit, _shade(colour, 0.85))


def _draw_toes(image: Pixels, species: BirdSpecies, perch: _Perch) -> None:
    colour = PAINTS[species.legs]
    g = perch.girth
    for foot in (-0.07, 0.07):
        for toe in (-0.035, 0.0, 0.035):
            path = [(foot, -0.62 * g), (foot + toe, -0.5 * g), (foot + 1.2 * toe, 0.1 * g)]
            _line(image, perch.frame(path), colour, 0.026 * perch.frame.unit)


def _draw_breast(
    image: Pixels,
    mask: Pixels,
    breast: str,
    body: _Frame,
    head: _Frame,
    rng: np.random.Generator,
    box: tuple[slice, slice],
) -> None:
    # Drawn for every species, so that the rest of the picture does not depend on the part.
    jitter = rng.uniform(-0.016, 0.016, _BREAST_GRID.shape)
    if breast == "plain":
        return
    if breast in ("spots", "streaks"):
        places = _BREAST_GRID + jitter
        tall = 1.0 if breast == "spots" else 2.6
        shape = np.array([(-1, 0), (-0.6, -0.75), (0, -1), (0.6, -0.75), (1, 0), (0.6, 0.75)])
        shape = np.concatenate([shape, [(0, 1), (-0.6, 0.75)]]) * (0.020, 0.020)
        shape = shape * (tall, 1.0 if breast == "spots" else 0.62)
        lean = _turn(125.0)
        marks = [body(shape @ lean.T + place) for place in places]
        _stain(image, mask, marks, _shade(PAINTS["black"], 1.5), box)
        return
    paint, kind = breast.split()
    outline = head(_BIB) if kind == "bib" else body(_BREAST_BAND)
    _stain(image, mask, outline, PAINTS[paint], box, 3)


def _wing_point(along: Points, across: Points) -> Points:
    place = along * (len(_WING_UPPER) - 1)
    index = np.arange(len(_WING_UPPER))
    upper, lower = (
        np.stack([np.interp(place, index, edge[:, axis]) for axis in (0, 1)], -1)
        for edge in (_WING_UPPER, _WING_LOWER)
    )
    return upper + (lower - upper) * across[:, None]


@cache
def _wing_area(
    along: tuple[float, float], across: tuple[float, float], bend: float = 0.0
) -> Points:
    """A piece of the wing: ``along`` from shoulder 0 to tip 1, ``across`` from upper 0 to lower 1.

    ``bend`` rounds both ends towards the tip.
    """
    lateral = np.linspace(*across, 9)
    bow = bend * (1 - np.linspace(-1, 1, 9) ** 2)
    near, far = (_wing_point(np.clip(at + bow, 0, 1), lateral) for at in along)
    return np.concatenate([near, far[::-1]])


def _draw_wing(
    image: Pixels, mask: Pixels, wing: str, body: _Frame, back: Colour, box: tuple[slice, slice]
) -> None:
    outline = body(np.concatenate([_WING_UPPER, _WING_LOWER[::-1]]))
    shadow = outline + body.unit * np.array([0.0, 0.04])
    _stain(image, mask, shadow, _shade(back, 0.5), box, 2 * round(0.03 * body.unit) + 1)
    _fill(image, outline, _shade(back, 0.72))
    _fill(mask, outline, 255)
    for feather in range(6):
        vane = body(_wing_area((0.45, 1.0), (feather / 6, (feather + 1) / 6)))
        _fill(image, vane, _shade(back, 0.56 + 0.1 * (feather % 2)))
        _line(image, vane[8:10], _shade(back, 0.95), 1)
    for row, end in enumerate((0.44, 0.30, 0.17)):
        tint = _shade(back, 0.74 + 0.07 * row)
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            covert = body(_wing_area((0.0, end), (low, low + 0.2), 0.035))
            _fill(image, covert, tint)
            _line(image, covert[9:], _shade(back, 0.62), 1)
    if wing == "white patch":
        _fill(image, body(_wing_area((0.38, 0.56), (0.40, 1.0), 0.06)), PAINTS["white"])
    elif wing != "plain":
        count, paint = wing.split()[:2]
        for at in (0.30,) if count == "one" else (0.18, 0.37):
            bar = body(_wing_area((at, at + 0.055), (0.14, 1.0), 0.04))
            _fill(image, bar, PAINTS[paint])


def _draw_head(
    image: Pixels,
    mask: Pixels,
    species: BirdSpecies,
    head: _Frame,
    back: Colour,
    box: tuple[slice, slice],
) -> None:
    paint, _, kind = species.head.partition(" ")
    if kind == "crest":
        crest = head(_CREST)
        _fill(image, crest, PAINTS[paint])
        _fill(mask, crest, 255)
    elif kind:
        clip = np.zeros_like(mask)
        _fill(clip, head(_HEAD), 255)
        _stain(image, clip, head(_HEAD_MARKS[kind]), PAINTS[paint], box, 3)
    bill = PAINTS[species.bill_colour]
    tip, root = _BILL_GAPE[species.bill]
    shape = head(_BILLS[species.bill])
    _fill(image, shape, bill)
    _fill(mask, shape, 255)
    _line(image, head([(0.17, root), (tip, root + 0.01)]), _shade(bill, 0.5), 1)
    ring, _, ringed = species.eye.partition(" ")
    eye = head(_EYE)
    if ringed:
        _dot(image, eye, 0.066 * head.unit, PAINTS[ring])
    else:
        _dot(image, eye, 0.05 * head.unit, _shade(back, 0.7))
    _dot(image, eye, 0.041 * head.unit, (22, 16, 14))
    _dot(image, eye + 0.014 * head.unit * np.array([-1, -1]), 0.012 * head.unit, (250, 250, 250))


def _light(image: Pixels, mask: Pixels, rng: np.random.Generator, unit: float) -> Pixels:
    """Round the bird by light from above, then set the scene's light, focus and sensor noise."""
    size = image.shape[0]
    k = 2 * round(0.13 * unit) + 1
    inside = mask.astype(np.float32) / 255
    height = cv2.blur(cv2.blur(inside, (k, k)), (k, k))
    across, down = (
        cv2.Sobel(height, -1, 1, 0, scale=0.125),
        cv2.Sobel(height, -1, 0, 1, scale=0.125),
    )
    side_light = float(rng.uniform(-0.7, 0.7))
    down_soft = rng.standard_normal((size // 2, size // 2), dtype=np.float32) * 0.035
    texture = cv2.resize(down_soft, (size, size), interpolation=cv2.INTER_LINEAR) * inside
    relief = (down + side_light * across) * (0.24 * unit) * inside
    dapple = rng.uniform(0.86, 1.12, (4, 4)).astype(np.float32)
    light = cv2.resize(dapple, (size, size), interpolation=cv2.INTER_CUBIC) * (1 + relief + texture)
    warmth = rng.uniform(-0.07, 0.07)
    balance = rng.uniform(0.86, 1.12) * np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32)
    lit = image.astype(np.float32) * light[..., None] * balance
    blur = float(rng.uniform(0.0, 0.75)) * size / 128
    if blur > 0.3:
        lit = np.asarray(cv2.GaussianBlur(lit, (3, 3), blur))
    grain = rng.standard_normal((size, size), dtype=np.float32) * float(rng.uniform(1.0, 5.0))
    picture: Pixels = np.clip(lit + grain[..., None], 0, 255).astype(np.uint8)
    return picture
