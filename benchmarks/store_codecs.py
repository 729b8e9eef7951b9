r"""What each codec of the feature store costs: MAP@R against float32, and bytes an image.

Queries keep their float32 features, as they come from a network; the gallery is read back from a
store of each codec. The first stage is the same for all, so that gains are the codec's alone.

    python benchmarks/store_codecs.py --images CUB_200_2011 --classes 26-50 \
        --backbone tf_efficientnet_lite0 --weights tf_efficientnet_lite0.safetensors \
        --output results
    python benchmarks/store_codecs.py --features features.npz --output results
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from emd_retrieval.datasets import ImageDataset, check_readable, load_images
from emd_retrieval.features import FeatureSet, build_extractor, extract_features, load_backbone
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.records import ResultRecord
from emd_retrieval.retrieval import FaissShortlist, LocalFeatureStore, compare_rankings
from emd_retrieval.retrieval.metrics import relevant_counts
from emd_retrieval.retrieval.store import CODECS

NAMES = ("nodes", "global_vectors", "labels")


def read_features(path: Path) -> tuple[FeatureSet, dict[str, Any]]:
    """Arrays ``nodes`` [n, N, D], ``global_vectors`` [n, G] and ``labels`` [n] of a file."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in NAMES if name in arrays}
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: state[name] for name in NAMES if name in state}
    missing = [name for name in NAMES if name not in found]
    if missing:
        raise SystemExit(f"{path.name} has no {', '.join(missing)}")
    nodes, vectors, labels = (found[name] for name in NAMES)
    features = FeatureSet(nodes.float(), vectors.float(), labels.long(), torch.arange(len(nodes)))
    return features, {"features": path.name, "images": len(features)}


def extract(arguments: argparse.Namespace) -> tuple[FeatureSet, dict[str, Any]]:
    collection, _ = check_readable(load_images(arguments.images, arguments.classes))
    backbone = load_backbone(arguments.backbone, weights=arguments.weights)
    extractor = build_extractor(arguments.extractor, backbone)
    dataset = ImageDataset(collection, extractor.evaluation_transform())
    features = extract_features(dataset, extractor, device=arguments.device)
    return features, {**collection.describe(), **extractor.describe()}


def through_store(features: FeatureSet, codec: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """The sets as a store of the codec gives them back; its size and speed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.store"
        _, nodes, channels = features.nodes.shape
        with LocalFeatureStore.create(path, channels=channels, nodes=nodes, codec=codec) as writer:
            for start in range(0, len(features), 1024):
                part = slice(start, start + 1024)
                writer.append(features.ids[part], features.nodes[part])
        store = LocalFeatureStore.open(path, verify=True)
        decoded = store.nodes()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        nodes_size = sum(file.stat().st_size for file in path.rglob("nodes.bin"))
        generator = torch.Generator().manual_seed(0)
        times = []
        for _ in range(50):
            ids = features.ids[torch.randperm(len(features), generator=generator)[:100]]
            began = time.perf_counter()
            store.nodes(store.rows_of(ids))
            times.append(1e3 * (time.perf_counter() - began))
    error = (decoded - features.nodes).norm(dim=2) / features.nodes.norm(dim=2).clamp_min(1e-12)
    return decoded, {
        "bytes of nodes an image": nodes_size // len(features),
        "bytes of the store an image": round(size / len(features)),
        "mean error of a node": f"{float(error.mean()):.1e}",
        "largest error of a node": f"{float(error.max()):.1e}",
        "100 sets read and decoded (ms)": round(statistics.median(times), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--features", type=Path, help=".npz or .pt: nodes, global_vectors, labels")
    source.add_argument("--images", type=Path, help="folder in CUB's layout or of class folders")
    parser.add_argument("--classes", help="as of `emd-retrieval evaluate`")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--extractor", default="fcn", choices=["fcn", "grid", "sampling"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shortlist", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the record into this folder")
    arguments = parser.parse_args()

    features, data = read_features(arguments.features) if arguments.features else extract(arguments)
    relevant = relevant_counts(features.labels, features.labels, gallery_includes_query=True)
    deepest = int(relevant.max())
    shortlist = min(max(arguments.shortlist, deepest), len(features) - 1)
    first = FaissShortlist(features.global_vectors).search(
        features.global_vectors, shortlist, exclude=torch.arange(len(features))
    )
    matcher = EMDMatcher()
    rankings, costs = {}, []
    for codec in CODECS:
        decoded, cost = through_store(features, codec)
        similarity = matcher.shortlist(
            features.nodes, matcher.prepare(decoded), first.rows, description=codec
        )
        rankings[codec] = first.reordered(similarity).top(deepest)
        costs.append({"codec": codec, **cost})
    evaluation = compare_rankings(rankings, features.labels, seed=arguments.seed)
    same = {
        codec: float(
            (ranking.rows[:, :10] == rankings["float32"].rows[:, :10]).all(1).float().mean()
        )
        for codec, ranking in rankings.items()
    }
    costs_table = pd.DataFrame(costs)
    costs_table["queries with the same top 10 (%)"] = [
        round(100 * same[codec], 2) for codec in CODECS
    ]
    summary = evaluation.summary
    record = ResultRecord(
        name="rerank_codecs",
        title="Codecs of the feature store: metrics against float32, and size",
        tables={"metrics": evaluation.metrics, "codecs": costs_table},
        summary=summary,
        settings={**matcher.describe(), "shortlist": shortlist},
        data=data,
        seed=arguments.seed,
        notes=(
            "Percent, with 95 % bootstrap intervals over queries; gains are over float32 and "
            "paired by query. Queries are float32, the gallery is read back from the store.",
            "Errors are relative to the length of a node. The store's bytes include ids, "
            "checksums and the id index, and no global vectors.",
        ),
    )
    if arguments.output:
        record.save(arguments.output)
    print(record.to_markdown())


if __name__ == "__main__":
    main()
