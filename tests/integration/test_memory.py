"""Nothing stays behind of a query or a training step; benchmarks/soak.py looks for longer."""

import sys
from pathlib import Path

import pytest
import torch
from support import structured_sets

from emd_retrieval.metric_learning import LossSettings, build_loss
from emd_retrieval.retrieval import EMDReranker, LocalFeatureStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def own_mib():
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def growth(turn, turns):
    """MiB by which this process grew over some turns, after as many to warm up."""
    for _ in range(turns):
        turn()
    before = own_mib()
    for _ in range(turns):
        turn()
    return own_mib() - before


def test_queries_leave_nothing_behind(tmp_path, generator):
    with LocalFeatureStore.create(tmp_path / "s", channels=32, nodes=25) as writer:
        writer.append(torch.arange(100), structured_sets(100, 25, 32, generator))
    store = LocalFeatureStore.open(tmp_path / "s")
    store.nodes()
    queries = structured_sets(8, 25, 32, generator)
    ids = torch.arange(100).expand(8, -1)
    reranker = EMDReranker(store)
    # The problems of one turn take 2 MB.
    assert growth(lambda: reranker.rerank(queries, ids, k=5), 100) < 32
    assert growth(lambda: reranker.rerank(queries, ids, k=5, return_flows=True), 20) < 8
    assert growth(store.refresh, 200) < 8


def test_training_steps_leave_nothing_behind(generator):
    loss = build_loss(
        LossSettings(name="multi_similarity", miner="multi_similarity"),
        num_classes=4,
        channels=32,
        nodes=14,
        matcher=None,
        generator=generator,
    )
    labels = torch.arange(4).repeat_interleave(4)
    embedder = torch.nn.Linear(32, 32)

    def step():
        embeddings = embedder(structured_sets(16, 14, 32, generator)).flatten(1)
        embedder.zero_grad()
        loss(embeddings, labels).backward()

    # Costs, plans and gradients of one step take 0.5 MB.
    assert growth(step, 150) < 16
