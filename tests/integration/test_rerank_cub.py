"""Pruning on real features: CUB's classes 26 to 30, from extraction to the answer."""

import numpy as np
import pytest
import torch

from emd_retrieval.datasets import ImageDataset, load_images
from emd_retrieval.features import build_extractor, extract_features, load_backbone
from emd_retrieval.retrieval import EMDReranker, FaissIndexShortlist, LocalFeatureStore

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.fixture(scope="module")
def features(cub_root, lite0_weights):
    backbone = load_backbone("tf_efficientnet_lite0", weights=lite0_weights)
    extractor = build_extractor("fcn", backbone).eval()
    images = load_images(cub_root, "26-30")
    return extract_features(ImageDataset(images, extractor.evaluation_transform()), extractor)


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_pruning_gives_the_answer_of_solving_everything(tmp_path, features, codec, alpha):
    n = len(features)
    with LocalFeatureStore.create(
        tmp_path / "s", channels=features.nodes.shape[2], nodes=14, codec=codec
    ) as writer:
        writer.append(np.arange(n), features.nodes)
    store = LocalFeatureStore.open(tmp_path / "s")
    store.nodes()  # from here on sets go from their file to the answer in one native call
    stage = FaissIndexShortlist.from_matrix(features.global_vectors)
    first = stage.search(features.global_vectors, 101).without(np.arange(n)).top(100)
    arguments = features.nodes, first.ids, first.scores
    pruned = EMDReranker(store).rerank(*arguments, k=10, alpha=alpha)
    whole = EMDReranker(store, prune=False).rerank(*arguments, k=10, alpha=alpha)
    assert torch.equal(pruned.ids, whole.ids)
    assert torch.equal(pruned.similarities, whole.similarities)
    assert pruned.skipped > 0.3
