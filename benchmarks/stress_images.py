"""Damage image files at random, over and over, and look at what decoding makes of them.

Of each format one file is cut short, or has some bytes changed, and is decoded. It may come out as
an image or as an ``UnreadableImageError``; any other error, and a decode of more than ten seconds,
is a finding, and the program's exit code says so. Cut files that decode to other pixels than the
whole one are counted, because nobody is told of those: the format has nothing to tell by.

    python benchmarks/stress_images.py --times 3000 --output results/stress_images.md
"""

from __future__ import annotations

import argparse
import collections
import io
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
from PIL import Image

from emd_retrieval._files import write_text
from emd_retrieval.datasets import UnreadableImageError, decode_rgb
from emd_retrieval.records import ResultRecord

SLOW_SECONDS = 10.0


def whole_files() -> dict[str, bytes]:
    """A file of each format and kind; noise, so that no two pixels are alike."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    frames = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)) for _ in range(2)]
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "jpg": (image, {"format": "JPEG", "exif": exif}),
        "jpg progressive": (image, {"format": "JPEG", "progressive": True}),
        "jpg CMYK": (image.convert("CMYK"), {"format": "JPEG"}),
        "png": (image, {"format": "PNG", "exif": exif}),
        "png palette": (image.quantize(32), {"format": "PNG"}),
        "png animated": (image, {"format": "PNG", "save_all": True, "append_images": frames}),
        "webp": (image, {"format": "WEBP", "exif": exif}),
        "webp lossless": (image, {"format": "WEBP", "lossless": True}),
        "gif animated": (image, {"format": "GIF", "save_all": True, "append_images": frames}),
        "bmp": (image, {"format": "BMP"}),
        "tif": (image, {"format": "TIFF", "exif": exif}),
        "tif LZW": (image, {"format": "TIFF", "compression": "tiff_lzw"}),
        "tif JPEG": (image, {"format": "TIFF", "compression": "jpeg"}),
        "ppm": (image, {"format": "PPM"}),
    }
    files = {}
    for name, (picture, options) in kinds.items():
        file = io.BytesIO()
        picture.save(file, **options)
        files[name] = file.getvalue()
    return files


def damage(whole: bytes, cut: bool, rng: np.random.Generator) -> bytes:
    """A file cut short, or with one to eight bytes changed, half of them near the start."""
    if cut:
        return whole[: rng.integers(len(whole))]
    damaged = bytearray(whole)
    for _ in range(rng.integers(1, 9)):
        reach = len(damaged) if rng.random() < 0.5 else min(len(damaged), 200)
        damaged[rng.integers(reach)] = rng.integers(256)
    return bytes(damaged)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=300, help="files of each format, damage (300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a markdown file for the counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(options.seed)
    rows, findings = [], []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        for name, whole in whole_files().items():
            path.write_bytes(whole)
            expected = np.asarray(decode_rgb(path))
            for kind in ("cut short", "bytes changed"):
                counts: collections.Counter[str] = collections.Counter()
                for _ in range(options.times):
                    path.write_bytes(damage(whole, kind == "cut short", rng))
                    start = time.perf_counter()
                    try:
                        same = np.array_equal(np.asarray(decode_rgb(path)), expected)
                        counts["same pixels" if same else "other pixels"] += 1
                    except UnreadableImageError:
                        counts["refused"] += 1
                    except Exception as error:
                        counts["other error"] += 1
                        findings.append(f"{name}, {kind}: {type(error).__name__}: {error}")
                    seconds = time.perf_counter() - start
                    slowest = max(slowest, seconds)
                    if seconds > SLOW_SECONDS:
                        findings.append(f"{name}, {kind}: {seconds:.0f} s to decode")
                outcomes = ("refused", "same pixels", "other pixels", "other error")
                rows.append({"format": name, "damage": kind, "files": options.times}
                            | {outcome: counts[outcome] for outcome in outcomes})  # fmt: skip
    record = ResultRecord(
        name="stress_images",
        title="Damaged image files through the decoder",
        tables={"outcomes": pd.DataFrame(rows)},
        settings={"times": options.times, "pillow": PIL.__version__},
        data={"formats": len(rows) // 2, "files": options.times * len(rows)},
        seed=options.seed,
        notes=(
            f"{len(findings)} findings; the slowest file took {slowest:.2f} s.",
            *findings[:20],
        ),
    )
    print(record.to_markdown())
    if options.output is not None:
        write_text(options.output, record.to_markdown())
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
