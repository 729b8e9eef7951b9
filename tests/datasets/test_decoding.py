"""What becomes of every kind of image file: one picture, or one reason; nothing else."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np
import odd_images
import pytest
from PIL import Image

from emd_retrieval.datasets import UnreadableImageError, decode_rgb
from emd_retrieval.datasets.decoding import image_size

PACKAGE = Path(__file__).parents[2] / "emd_retrieval"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("name", odd_images.SOUND)
def test_every_kind_shows_the_same_picture(tmp_path: Path, name: str) -> None:
    decoded = decode_rgb(odd_images.write(tmp_path, name))
    assert (decoded.mode, decoded.size) == ("RGB", (odd_images.WIDTH, odd_images.HEIGHT))
    # The middle of each quarter, away from the edges that JPEG blurs.
    pixels = np.asarray(decoded).astype(int)
    quarters = pixels[[6, 6, 18, 18], [8, 24, 8, 24]]
    exact = not name.lower().endswith(".jpg") and name != "Lab.tif"
    tolerance = 3 if exact else 12
    assert np.abs(quarters - [*odd_images.TOP, *odd_images.BOTTOM]).max() <= tolerance


@pytest.mark.parametrize("name", odd_images.STRANGE_SIZES)
def test_strange_sizes(tmp_path: Path, name: str) -> None:
    file = odd_images.write(tmp_path, name)
    assert decode_rgb(file).size == image_size(file) == odd_images.STRANGE_SIZES[name]


@pytest.mark.parametrize("name", odd_images.UNREADABLE)
def test_what_cannot_be_read_is_one_error_with_the_reason(tmp_path: Path, name: str) -> None:
    file = odd_images.write(tmp_path, name)
    with pytest.raises(UnreadableImageError, match=odd_images.UNREADABLE[name][1]) as caught:
        decode_rgb(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gone.png", "file not found"), ("x" * 300 + ".png", "file name too long"),
     ("nul\0.png", "embedded null"), (".", "it is a folder")],
)  # fmt: skip
def test_paths_that_lead_nowhere(tmp_path: Path, name: str, reason: str) -> None:
    for look in (decode_rgb, image_size):
        with pytest.raises(UnreadableImageError, match=reason):
            look(tmp_path / name)


def test_a_path_longer_than_the_system_takes(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="file name too long"):
        decode_rgb(tmp_path.joinpath(*["folder" * 20] * 50, "a.png"))


def test_the_size_of_a_bomb_is_known_before_it_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="exceeds limit of 178956970 pixels"):
        image_size(odd_images.write(tmp_path, "30,000 pixels a side.png"))


def test_the_limit_is_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = odd_images.write(tmp_path, "plain.png")
    pixels = odd_images.WIDTH * odd_images.HEIGHT
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2 - 1)
    with pytest.raises(UnreadableImageError, match=r"too large .* make it smaller"):
        decode_rgb(file)
    # Between one and two times the limit Pillow warns; made an error, that is a reason as well.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        decode_rgb(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImageError, match="too large"):
            decode_rgb(file)


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under the name of a photo: Pillow by itself would hand it to Ghostscript."""
    marker, programs = tmp_path / "ran", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 0\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    file = odd_images.write(tmp_path, "postscript.jpg")
    with pytest.raises(UnreadableImageError, match="not an image"):
        decode_rgb(file)
    assert not marker.exists()
    with pytest.raises(OSError), Image.open(file) as image:
        image.load()
    assert marker.exists(), "the attack is a real one"


def test_one_place_opens_images() -> None:
    """Elsewhere the formats, the limit and the way up would not be held."""
    opening = re.compile(r"Image\.open\(|imread|imdecode|\bread_image\(|decode_image\(")
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if opening.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"datasets/decoding.py"}


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    file = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":  # which Pillow 10 reads, but does not write
        file.write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(file)
    decoded = np.asarray(decode_rgb(file))
    assert decoded[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putpixel((0, 0), (10, 20, 30, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    image.save(tmp_path / "clear.png")
    decoded = decode_rgb(tmp_path / "clear.png")
    colours = [decoded.getpixel((x, 0)) for x in range(3)]
    assert colours == [(10, 20, 30), (255, 255, 255), (204, 204, 204)]


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.gif", transparency=0)
    decoded = decode_rgb(tmp_path / "palette.gif")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "LAB"])
def test_white_is_white_in_every_mode(tmp_path: Path, mode: str) -> None:
    white = {"LAB": (255, 128, 128), "CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128)}
    image = Image.new(mode, (8, 8), white.get(mode, "white"))
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "LAB": "tif"}.get(mode, "png")
    image.save(tmp_path / f"image.{suffix}")
    decoded = np.asarray(decode_rgb(tmp_path / f"image.{suffix}"))
    assert decoded.shape == (8, 8, 3)
    assert decoded.min() >= 254


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif", "ppm"])
def test_damage_never_escapes_as_another_error(tmp_path: Path, suffix: str) -> None:
    """A bounded form of ``benchmarks/stress_images.py``."""
    rng = np.random.default_rng(0)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    messages = []
    for trial in range(150):
        damaged = bytearray(whole[: rng.integers(len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, max(len(damaged), 1), 3):
            if damaged:
                damaged[place % min(len(damaged), 80)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            decode_rgb(path)
        except UnreadableImageError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(path) in message for message in messages)
