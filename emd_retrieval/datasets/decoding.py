"""The one place that opens image files: to 8-bit RGB, upright, or an error that names the file.

What an odd file becomes is told in ``docs/reliability.md``; nothing here knows labels or classes.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# By name, because Pillow goes by content: EPS under the name of a JPEG would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# How to turn a picture upright, by the EXIF orientation it was taken in.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders are known to raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class UnreadableImageError(ValueError):
    """One or more images cannot be decoded; the message names them and why."""

    def __init__(self, message: str) -> None:
        # A decoding process hands its error over as text, with the traceback before the reason.
        if message.startswith("Caught "):
            message = message.strip().rpartition("UnreadableImageError: ")[2]
        super().__init__(message)


def decode_rgb(path: Path) -> Image.Image:
    """Decode an image file to RGB, 8 bits a channel, upright.

    The EXIF orientation is applied, and passed over where it is damaged; transparency is laid over
    white; 16-bit values are scaled to 8 bits; palettes, CMYK and other colour spaces are converted,
    without their colour profiles; of several frames the first counts.

    Raises:
        UnreadableImageError: If the file is missing, empty, no regular file, no image of
            :data:`FORMATS`, damaged, of more pixels than Pillow's limit against decompression bombs
            (twice ``PIL.Image.MAX_IMAGE_PIXELS``), or holds values of unknown range (32-bit
            integers or floats).
    """
    with _opened(path) as image:
        image.load()
        turn = _turn(image)
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as the file has them, without decoding.

    Finds missing, empty and foreign files, and misses damage further in.

    Raises:
        UnreadableImageError: See :func:`decode_rgb`.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        status = path.stat()
        # A pipe would be waited for without end.
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ValueError(f"it is {kind}")
        if not status.st_size:
            raise ValueError("the file is empty")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except _DECODE_ERRORS as error:
        raise UnreadableImageError(f"{path}: {_reason(error)}") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a decoded image upright; damaged metadata says nothing about its pixels."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODE_ERRORS:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow clips 16-bit grey to 255 on conversion; 65535 / 257 = 255.
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ValueError(
            f"holds 32-bit values (mode {mode}), whose range is unknown; convert it to 8 or 16 bits"
        )
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or one of an unknown format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too large ({str(error).removesuffix(' DOS attack.')}); make it smaller"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
