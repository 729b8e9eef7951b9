"""How long few-shot evaluation and a meta-training episode take, from cached features.

Random features in the shape of ResNet-12's (25 nodes of 640 channels, rectified, 20 classes of 600
images as in CIFAR-FS). Times are those of a machine: run it alone. ``--threads`` sets torch's
threads; on a busy machine one thread is faster than two.

    python benchmarks/fewshot.py --threads 2 --output results/fewshot_speed.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from emd_retrieval._files import write_text
from emd_retrieval.fewshot import (
    EMDNearest,
    StructuredFC,
    draw_episodes,
    evaluate_episodes,
)
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.records import ResultRecord, markdown_table

CLASSES, NODES = 20, 25


def features(images: int, channels: int, noise: float = 6.0) -> tuple[Tensor, Tensor]:
    """Rectified features around one map a class; hard enough that classifiers err."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(images)
    centres = torch.randn(CLASSES, NODES, channels, generator=generator)
    nodes = torch.empty(len(labels), NODES, channels)
    for label in range(CLASSES):
        part = nodes[label * images : (label + 1) * images]
        part.normal_(0, noise, generator=generator).add_(centres[label]).relu_()
    return nodes, labels


def fastest(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round, the first one left out."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def meta_step(matcher: EMDMatcher, channels: int) -> Callable[[], None]:
    """Forward and backward of one episode: 75 queries, 5 classes, 375 problems."""
    generator = torch.Generator().manual_seed(1)
    support = torch.rand(1, 5, 1, NODES, channels, generator=generator).requires_grad_()
    query = torch.rand(1, 75, NODES, channels, generator=generator).requires_grad_()
    labels = torch.arange(5).repeat_interleave(15)
    classifier = EMDNearest(matcher)

    def step() -> None:
        support.grad = query.grad = None
        logits = classifier(support, query)[0]
        torch.nn.functional.cross_entropy(logits, labels).backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=5000, help="1-shot episodes")
    parser.add_argument("--sfc-episodes", type=int, default=600, help="5-shot episodes")
    parser.add_argument("--images", type=int, default=600, help="images a class")
    parser.add_argument("--channels", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=20, help="meta-training episodes")
    parser.add_argument("--output", type=Path, help="markdown record; .csv and .json beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    nodes, labels = features(options.images, options.channels)
    rows = []
    for name, classifier, shot, count, target in (
        ("5-way 1-shot, EMD", EMDNearest(), 1, options.episodes, 30 * options.episodes / 5000),
        (
            "5-way 5-shot, SFC, 100 steps of 5",
            StructuredFC(),
            5,
            options.sfc_episodes,
            90 * options.sfc_episodes / 600,
        ),
    ):
        start = time.perf_counter()
        episodes = draw_episodes(labels, shot=shot, count=count)
        scores = evaluate_episodes(classifier, nodes, episodes, description=name)
        seconds = time.perf_counter() - start
        rows.append((f"{count} episodes, {name}", f"{seconds:.1f} s", f"{target:.1f} s", scores))
        print(*map(str, rows[-1]))
    for name, matcher in (
        ("exact duals", EMDMatcher()),
        ("weights detached", EMDMatcher(weight_gradient=False)),
    ):
        seconds = fastest(meta_step(matcher, options.channels), options.rounds)
        row = f"1 meta-training episode, EMD forward and backward, {name}"
        rows.append((row, f"{1e3 * seconds:.1f} ms", "10 ms", ""))
    table = pd.DataFrame(rows, columns=["work", "time", "wanted", "accuracy (%)"]).astype(str)
    print(markdown_table(table))
    if options.output:
        record = ResultRecord(
            name="fewshot_speed",
            title="Few-shot evaluation from cached features: time",
            tables={"time": table},
            settings={name: str(value) for name, value in vars(options).items()},
            data={"name": "random features", "images": len(nodes), "nodes": NODES},
            seed=0,
        )
        write_text(options.output, record.to_markdown())
        write_text(options.output.with_suffix(".json"), record.to_json())
        table.to_csv(options.output.with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()
