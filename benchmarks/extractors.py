"""Where the time of an image goes: decoding, cutting views, the backbone; and ways to cut patches.

All stages and methods take turns image by image, round after round, and each one's fastest round
counts, so that a busy machine slows all of them alike. Everything runs on one thread, as it does in
each worker process of a data loader.

    python benchmarks/extractors.py --data CUB_200_2011 --backbone tf_efficientnet_lite0 \
        --weights tf_efficientnet_lite0.safetensors --output results/extractors.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emd_retrieval._files import write_text
from emd_retrieval.datasets import load_images
from emd_retrieval.features import Backbone, build_extractor, crop_resize, load_backbone
from emd_retrieval.features.patches import PatchExtractor
from emd_retrieval.features.transforms import pixels_of
from emd_retrieval.progress import progress
from emd_retrieval.records import ResultRecord, markdown_table

Run = Callable[[], object]


def cubic_rows(starts: Tensor, stops: Tensor, size: int, length: int) -> Tensor:
    """Antialiased bicubic resampling of one axis, a matrix a box. Shape: [P, size, length]."""
    scale = (stops - starts).double().view(-1, 1, 1) / size
    width = scale.clamp(min=1)
    centre = (torch.arange(size) + 0.5).view(1, -1, 1) * scale
    place = torch.arange(length).view(1, 1, -1) - starts.view(-1, 1, 1)
    x = ((place + 0.5 - centre) / width).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    kernel = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    kernel = kernel * ((place >= 0) & (place < (stops - starts).view(-1, 1, 1)))
    return (kernel / kernel.sum(dim=2, keepdim=True)).float()


def by_matrices(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """All boxes as two batched matrix products over the whole image."""
    rows = cubic_rows(boxes[:, 1], boxes[:, 3], size, pixels.shape[1])
    columns = cubic_rows(boxes[:, 0], boxes[:, 2], size, pixels.shape[2])
    narrow = pixels.float().flatten(0, 1) @ columns.mT  # [P, 3 * H, size]
    narrow = narrow.unflatten(1, (3, -1))
    patches: Tensor = (rows.unsqueeze(1) @ narrow).round().clamp(0, 255)
    return patches


def by_float_boxes(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Box by box in float32, without the vector code for uint8."""
    image = pixels.float().unsqueeze(0)
    patches = [
        F.interpolate(
            image[:, :, top:bottom, left:right], (size, size), mode="bicubic", antialias=True
        )
        for left, top, right, bottom in boxes.tolist()
    ]
    return torch.cat(patches).round().clamp(0, 255)


def by_pillow(image: Image.Image, boxes: Tensor, size: int) -> Tensor:
    """Box by box in Pillow."""
    patches = [
        np.asarray(image.crop(tuple(box)).resize((size, size), Image.Resampling.BICUBIC))
        for box in boxes.tolist()
    ]
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)


def crop_one(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    return crop_resize(pixels.unsqueeze(0), boxes.unsqueeze(0), size)[0]


def fastest(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest round of each run; they take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: 1e3 * seconds for name, seconds in best.items()}


def add(total: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return {name: total.get(name, 0.0) + value for name, value in more.items()}


def stages(
    collection: Any, rows: list[int], backbone: Backbone, sizes: list[int], rounds: int
) -> pd.DataFrame:
    """Milliseconds an image of each stage, for each extractor."""
    extractors = {"fcn": build_extractor("fcn", backbone).eval()}
    for size in sizes:
        for name in ("grid", "sampling"):
            built = build_extractor(name, backbone, patch_size=size).eval()
            extractors[f"{name}, {size} px"] = built
    transforms = {name: e.evaluation_transform() for name, e in extractors.items()}
    decode: dict[str, float] = {}
    views: dict[str, float] = {}
    trunk: dict[str, float] = {}
    for row in progress(rows, "stages"):
        image = collection.load(row)
        batches = {name: transform(image).unsqueeze(0) for name, transform in transforms.items()}
        decode = add(decode, fastest({"decode": partial(collection.load, row)}, rounds))
        cuts: dict[str, Run] = {name: partial(cut, image) for name, cut in transforms.items()}
        views = add(views, fastest(cuts, rounds))
        passes: dict[str, Run] = {
            name: partial(extractors[name], batch) for name, batch in batches.items()
        }
        trunk = add(trunk, fastest(passes, max(1, rounds // 3)))
    table = pd.DataFrame(
        {
            "extractor": list(extractors),
            "nodes": [e.num_nodes for e in extractors.values()],
            "decode, ms": decode["decode"] / len(rows),
            "views, ms": [views[name] / len(rows) for name in extractors],
            "backbone, ms": [trunk[name] / len(rows) for name in extractors],
        }
    )
    table["views / backbone"] = table["views, ms"] / table["backbone, ms"]
    return table


def ways_to_cut(
    collection: Any, rows: list[int], extractor: PatchExtractor, rounds: int
) -> pd.DataFrame:
    """Milliseconds an image of each way to cut and resize the same boxes."""
    size = extractor.patch_size
    total: dict[str, float] = {}
    error: dict[str, float] = {}
    for row in progress(rows, f"cutting {extractor.name} {size}"):
        image = collection.load(row)
        pixels = pixels_of(image)
        generator = torch.Generator().manual_seed(row)
        boxes = extractor.layout.evaluation(image.height, image.width, generator)
        runs: dict[str, Callable[[], Tensor]] = {
            "crop_resize: uint8, box by box": partial(crop_one, pixels, boxes, size),
            "float32, box by box": partial(by_float_boxes, pixels, boxes, size),
            "Pillow, box by box": partial(by_pillow, image, boxes, size),
            "matrix products, all boxes": partial(by_matrices, pixels, boxes, size),
        }
        exact = by_float_boxes(pixels, boxes, size)
        for way, run in runs.items():
            difference = float((run().float() - exact).abs().max())
            error[way] = max(error.get(way, 0.0), difference)
        total = add(total, fastest(dict(runs), rounds))
    ours = next(iter(total.values()))
    return pd.DataFrame(
        {
            "boxes": f"{extractor.name}, {size} px",
            "way": list(total),
            "ms an image": [milliseconds / len(rows) for milliseconds in total.values()],
            "times the first": [milliseconds / ours for milliseconds in total.values()],
            "largest difference, grey levels": list(error.values()),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of images by class")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", type=Path, help="speed does not depend on them")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 224], help="of patches")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, help="write the record to this markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    collection = load_images(arguments.data)
    rows = np.linspace(0, len(collection) - 1, arguments.images).astype(int).tolist()
    backbone = load_backbone(arguments.backbone, weights=arguments.weights, pretrained=False)
    with torch.inference_mode():
        tables = {
            "stages": stages(collection, rows, backbone, arguments.sizes, arguments.rounds),
            "ways_to_cut": pd.concat(
                [
                    ways_to_cut(
                        collection,
                        rows,
                        build_extractor(name, backbone, patch_size=size),  # type: ignore[arg-type]
                        arguments.rounds,
                    )
                    for name in ("grid", "sampling")
                    for size in arguments.sizes
                ],
                ignore_index=True,
            ),
        }
    record = ResultRecord(
        name="extractors",
        title="Time of an image: decoding, cutting views, the backbone",
        tables=tables,
        settings={
            "backbone": backbone.name,
            "rounds": arguments.rounds,
            "threads": 1,
            "statistic": "mean over images of the fastest round",
        },
        data={"name": collection.name, "images": len(rows)},
        seed=0,
        notes=("Views: cutting, resizing, flipping and normalising, from a decoded image.",),
    )
    for table in tables.values():
        print(markdown_table(table), end="\n\n")
    if arguments.output:
        write_text(arguments.output, record.to_markdown())


if __name__ == "__main__":
    main()
