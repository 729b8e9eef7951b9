"""Image files as no camera of ours writes them: sound ones of every kind, and ones nobody can read.

``SOUND`` and ``UNREADABLE`` name every kind; :func:`write` makes the file.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from packaging.version import Version
from PIL import Image

Maker = Callable[[Path], None]

# Left half dark blue, right half orange, darker at the bottom: turned or recoloured it shows.
TOP, BOTTOM = ((20, 40, 160), (240, 150, 30)), ((10, 20, 80), (120, 75, 15))
WIDTH, HEIGHT = 32, 24


def picture() -> Image.Image:
    """What every sound file of :data:`SOUND` shows, unless its name says otherwise."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for row, (left, right) in enumerate((TOP, BOTTOM)):
        part = pixels[row * HEIGHT // 2 : (row + 1) * HEIGHT // 2]
        part[:, : WIDTH // 2], part[:, WIDTH // 2 :] = left, right
    return Image.fromarray(pixels)


def png(
    values: np.ndarray, *, colour: int, before: bytes = b"", size: tuple[int, int] | None = None
) -> bytes:
    """A PNG by hand, for what Pillow does not write; ``size`` may lie."""
    depth = 8 * values.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in values)
    width, height = size or (values.shape[1], values.shape[0])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def tiff_16_bit() -> bytes:
    """An RGB TIFF of 16 bits a channel."""
    data = (np.asarray(picture()).astype("<u2") * 257).tobytes()
    # Tag, type (3 short, 4 long), count, value; the depths and pixels lie behind the directory.
    behind = 8 + 2 + 9 * 12 + 4
    entries = [
        (256, 3, 1, WIDTH), (257, 3, 1, HEIGHT), (258, 3, 3, behind), (259, 3, 1, 1),
        (262, 3, 1, 2), (273, 4, 1, behind + 6), (277, 3, 1, 3), (278, 3, 1, HEIGHT),
        (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0)
        + struct.pack("<HHH", 16, 16, 16) + data
    )  # fmt: skip


def _saved(image: Callable[[], Image.Image], **options: Any) -> Maker:
    return lambda file: image().save(file, **options)


def _written(content: Callable[[], bytes]) -> Maker:
    def make(file: Path) -> None:
        file.write_bytes(content())

    return make


def _converted(mode: str) -> Callable[[], Image.Image]:
    return lambda: picture().convert(mode)


def _deep(colour: int, alpha: bool = False) -> Callable[[], bytes]:
    def content() -> bytes:
        values = np.asarray(picture()).astype(np.uint16) * 257
        if alpha:
            values = np.concatenate([values, np.full_like(values[..., :1], 65535)], axis=2)
        return png(values, colour=colour)

    return content


def _animated(**options: Any) -> Maker:
    def make(file: Path) -> None:
        others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime")]
        picture().save(file, save_all=True, append_images=others, **options)

    return make


def _with_exif(content: bytes) -> Maker:
    return lambda file: picture().save(file, exif=content)


def turned(orientation: int) -> Maker:
    """The picture as a camera held otherwise writes it: turned, with the orientation beside it."""
    # What undoes the orientation n is done by the orientation below.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip

    def make(file: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = picture()
        if orientation in undo:
            image = image.transpose(undo[orientation])
        image.save(file, exif=exif, **({"quality": 95} if file.suffix == ".jpg" else {}))

    return make


def _transparent() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(255)
    return image


SOUND: dict[str, Maker] = {
    "plain.png": _saved(picture),
    "plain.jpg": _saved(picture, quality=95),
    "plain.webp": _saved(picture, lossless=True),
    "plain.bmp": _saved(picture),
    "plain.tif": _saved(picture),
    "plain.ppm": _saved(picture),
    "progressive.jpg": _saved(picture, quality=95, progressive=True),
    "16-bit colour.png": _written(_deep(2)),
    "16-bit colour and alpha.png": _written(_deep(6, alpha=True)),
    "16-bit colour.tif": _written(tiff_16_bit),
    "CMYK.jpg": _saved(_converted("CMYK"), quality=95),
    "CMYK.tif": _saved(_converted("CMYK")),
    "Lab.tif": _saved(_converted("LAB")),
    "palette.png": _saved(lambda: picture().quantize(8)),
    "palette.gif": _saved(lambda: picture().quantize(8)),
    "palette.bmp": _saved(lambda: picture().quantize(8)),
    "alpha.png": _saved(_transparent),
    "alpha.webp": _saved(_transparent, lossless=True),
    "animated.gif": _animated(),
    "animated.webp": _animated(lossless=True),
    "animated.png": _animated(),
    "many pages.tif": _animated(),
    # Earlier releases of Pillow read these, but write damaged ones.
    **(
        {"two views.jpg": _animated(format="MPO", quality=95)}
        if Version(PIL.__version__) >= Version("11.3")
        else {}
    ),
    **{
        f"turned {orientation}.{suffix}": turned(orientation)
        for suffix in ("jpg", "png", "webp", "tif")
        for orientation in (1, 2, 3, 4, 5, 6, 7, 8)
    },
    "orientation of no meaning.jpg": turned(99),
    "EXIF of garbage.jpg": _with_exif(b"Exif\0\0garbage"),
    "EXIF of garbage.png": _with_exif(b"Exif\0\0garbage"),
    "EXIF of garbage.webp": _with_exif(b"garbage"),
    "EXIF cut short.jpg": _with_exif(b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    "wrong suffix.gif": lambda file: picture().save(file, format="PNG"),
    "CAPITALS.JPG": _saved(picture, quality=95, format="JPEG"),
    "two words.png": _saved(picture),
    "Zaunkönig 鳥 🐦.png": _saved(picture),
    "line\nbreak.png": _saved(picture),
    "-o.png": _saved(picture),
    "'quotes\" & <b>.png": _saved(picture),
    "{name} %s $HOME *.png": _saved(picture),
    f"{'long' * 62}.png": _saved(picture),
}
"""Kinds of files that decode to :func:`picture`."""


# Sound as well, but of another size.
STRANGE_SIZES: dict[str, tuple[int, int]] = {
    "one pixel.png": (1, 1),
    "one row.png": (30_000, 1),
    "one column.png": (1, 30_000),
}


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _link(target: str) -> Maker:
    return lambda file: file.symlink_to(target)


def _pipe(file: Path) -> None:
    os.mkfifo(file)


def _large(width: int, height: int) -> Callable[[], bytes]:
    return lambda: png(np.zeros((1, 1, 3), np.uint8), colour=2, size=(width, height))


def _inflating(kind: bytes) -> Callable[[], bytes]:
    content = chunk(kind, b"x\0\0" + zlib.compress(bytes(20_000_000)))
    return lambda: png(np.zeros((2, 2), np.uint8), colour=0, before=content)


# Ghostscript's input; Pillow goes by content and would start that program.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"

UNREADABLE: dict[str, tuple[Maker, str]] = {
    "zero bytes.png": (_empty, "the file is empty"),
    "text.png": (_written(lambda: b"no image"), "not an image, or one of an unknown format"),
    "drawing.png": (
        _written(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "not an image",
    ),
    "postscript.jpg": (_written(lambda: POSTSCRIPT), "not an image"),
    "cut short.jpg": (_cut, "truncated"),
    "cut short.png": (_cut, "truncated"),
    "cut short.gif": (_cut, "truncated"),
    "cut short.bmp": (_cut, "truncated"),
    "cut short.webp": (_cut, "decoder|truncated|not an image"),
    "cut short.tif": (_cut, r"truncated|too short|buffer|-2|decoder|unpack|IFD"),
    "30,000 pixels a side.png": (
        _written(_large(30_000, 30_000)),
        r"too large \(Image size \(900000000 pixels\) exceeds limit",
    ),
    "bomb of text.png": (_written(_inflating(b"zTXt")), "[Dd]ecompressed [Dd]ata [Tt]oo [Ll]arge"),
    "bomb of a profile.png": (
        _written(_inflating(b"iCCP")),
        "[Dd]ecompressed [Dd]ata [Tt]oo [Ll]arge",
    ),
    "no width.png": (_written(_large(0, 4)), "not an image"),
    "floats.tif": (
        lambda file: Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(file),
        "32-bit values",
    ),
    "whole numbers.tif": (
        lambda file: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(file),
        "32-bit values",
    ),
    "link to itself.png": (_link("link to itself.png"), "too many levels of symbolic links"),
    "link to nothing.png": (_link("nothing.png"), "file not found"),
    "pipe.png": (_pipe, "no regular file"),
}
"""Kinds of files that are refused, and a pattern of the reason."""


def write(folder: Path, name: str) -> Path:
    """Write a file of a kind, by its name."""
    file = folder / name
    if name in SOUND:
        SOUND[name](file)
    elif name in STRANGE_SIZES:
        Image.new("RGB", STRANGE_SIZES[name], TOP[0]).save(file)
    else:
        UNREADABLE[name][0](file)
    return file
