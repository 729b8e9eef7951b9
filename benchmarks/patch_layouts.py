"""What patches of which layout say through an untrained head: mean of the nodes, and EMD.

The question behind the Grid and Sampling rows of the frozen Table 8, put to training classes alone.
Every layout is scored over the same images, all pairs; results are kept by layout, network, weights
and images, so a killed run goes on.

    python benchmarks/patch_layouts.py --data CUB_200_2011 --classes 1-25 \
        --backbone tf_efficientnet_lite0.in1k --weights tf_efficientnet_lite0.safetensors \
        --output results/patch_layouts.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from emd_retrieval._checksums import json_digest
from emd_retrieval._files import write_text
from emd_retrieval.datasets import ImageDataset, load_images
from emd_retrieval.features import build_extractor, load_backbone
from emd_retrieval.features.extraction import extract_features
from emd_retrieval.records import ResultRecord, markdown_table
from emd_retrieval.retrieval.evaluation import evaluate_sets
from emd_retrieval.training.compiled import compile_trunk
from emd_retrieval.training.trunk_cache import state_checksum

METRICS = ("P@1", "RP", "MAP@R")
LAYOUTS: dict[str, dict[str, Any]] = {
    "whole image, FCN (3, 2, 1)": {"name": "fcn", "pyramid": [3, 2, 1], "include_map": False},
    "Grid (3, 2), 128 px": {"name": "grid", "grid": [3, 2], "patch_size": 128},
    "Grid (3, 2), 224 px": {"name": "grid", "grid": [3, 2], "patch_size": 224},
    "Grid (2, 1), 224 px": {"name": "grid", "grid": [2, 1], "patch_size": 224},
    "9 samples of .08 to 1, 224 px": {"name": "sampling", "patches": 9, "patch_size": 224},
    "9 samples of .5 to 1, 224 px": {
        "name": "sampling", "patches": 9, "patch_size": 224, "scale": (0.5, 1.0),
    },
}  # fmt: skip


def score(layout: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """P@1, RP and MAP@R of the mean of the nodes and of EMD, in percent."""
    settings = dict(layout)
    backbone = load_backbone(arguments.backbone, weights=arguments.weights)
    extractor = compile_trunk(build_extractor(settings.pop("name"), backbone, **settings))
    transform = extractor.evaluation_transform(resize=256, crop=224)
    images = ImageDataset(load_images(arguments.data, classes=arguments.classes), transform)
    features = extract_features(images, extractor, bf16=True)
    metrics = evaluate_sets(features, shortlist=None, curve=False).metrics
    found = {"nodes": float(features.nodes.shape[1])}
    for method, title in (("Raw", "mean"), ("DeepEMD", "EMD")):
        rows = metrics[metrics["method"] == method]
        values = dict(zip(rows["metric"], rows["value"], strict=True))
        found |= {f"{title} {name}": float(values[name]) for name in METRICS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--classes", default="1-25", help="training classes (1-25)")
    parser.add_argument("--backbone", required=True, help="timm's name")
    parser.add_argument("--weights", type=Path, help="local file; timm's hub without")
    parser.add_argument("--kept", type=Path, default=Path("runs/patch_layouts"))
    parser.add_argument("--output", type=Path, help="write the record to this markdown file")
    arguments = parser.parse_args()
    data = load_images(arguments.data, classes=arguments.classes).describe()
    backbone = load_backbone(arguments.backbone, weights=arguments.weights)
    network = {"backbone": backbone.describe(), "weights": state_checksum(backbone)}
    rows = []
    for label, layout in LAYOUTS.items():
        key = json_digest({"layout": layout, "network": network, "images": data["sha256"]})
        file = arguments.kept / f"{key[:12]}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(score(layout, arguments)) + "\n")
        rows.append({"layout": label, **json.loads(file.read_text(encoding="utf-8"))})
    table = pd.DataFrame(rows).round(2).astype({"nodes": int})
    table["gain in MAP@R"] = (table["EMD MAP@R"] - table["mean MAP@R"]).round(2)
    print(markdown_table(table))
    if arguments.output:
        record = ResultRecord(
            name="patch_layouts",
            title="Layouts of patches through a frozen trunk, nothing trained",
            tables={"layouts": table},
            settings={"backbone": arguments.backbone, "resize": 256, "crop": 224, "bf16": True},
            data=data,
            seed=0,
            notes=(
                "Percent; query = gallery, all pairs. Mean: cosine of the mean of the same nodes.",
                "Training classes of the partial CUB: what is seen here may decide on a recipe.",
            ),
        )
        write_text(arguments.output, record.to_markdown())


if __name__ == "__main__":
    main()
