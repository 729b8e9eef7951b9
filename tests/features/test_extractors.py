import pytest
import torch
from torch import nn

from emd_retrieval.features import FCNExtractor, load_backbone, pyramid_pool


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone("resnet10t", pretrained=False)


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 224, 224, generator=generator)


@pytest.mark.parametrize(
    ("pyramid", "include_map", "nodes", "global_node"),
    [
        ((3, 2, 1), False, 14, 13),
        ((1, 2), False, 5, 0),
        ((3, 2), False, 13, None),
        ((2, 1), True, 54, 4),
        ((), True, 49, None),
    ],
)
def test_nodes_and_global_vector(pyramid, include_map, nodes, global_node, backbone, images):
    extractor = FCNExtractor(backbone, pyramid=pyramid, include_map=include_map).eval()
    assert extractor.global_node == global_node
    with torch.no_grad():
        sets, pooled = extractor.with_global(images)
        feature_map = backbone(images)
        assert torch.equal(extractor(images), sets)
    assert sets.shape == (2, nodes, backbone.channels)
    torch.testing.assert_close(sets, pyramid_pool(feature_map, pyramid, include_map=include_map))
    torch.testing.assert_close(pooled, feature_map.mean(dim=(2, 3)))


@pytest.mark.parametrize("pyramid", [(3, 2, 1), (3, 2)])
def test_the_embedder_commutes_with_pooling(pyramid, backbone, images):
    torch.manual_seed(0)
    extractor = FCNExtractor(backbone, pyramid=pyramid, embedding_size=16).eval()
    assert extractor.channels == 16
    with torch.no_grad():
        sets, pooled = extractor.with_global(images)
        cells = extractor.embedder(backbone(images).permute(0, 2, 3, 1))
        embedded_map = cells.permute(0, 3, 1, 2)
    torch.testing.assert_close(sets, pyramid_pool(embedded_map, pyramid), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, embedded_map.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_gradients_reach_embedder_and_backbone(backbone, images):
    extractor = FCNExtractor(backbone, embedding_size=8).eval()
    extractor(images).square().sum().backward()
    assert extractor.embedder.weight.grad.abs().sum() > 0
    assert next(backbone.parameters()).grad.abs().sum() > 0
    backbone.zero_grad()


def test_boxes_count_as_many_as_nodes(backbone):
    assert FCNExtractor(backbone, pyramid=(3, 2)).node_boxes().shape == (13, 4)
    assert FCNExtractor(backbone, include_map=True).node_boxes() is None


def test_describe(backbone):
    extractor = FCNExtractor(backbone, pyramid=[3, 1], include_map=True, embedding_size=8)
    assert extractor.describe() == {
        "extractor": "fcn",
        "backbone": "resnet10t",
        "layer": None,
        "channels": 512,
        "pyramid": [3, 1],
        "include_map": True,
        "embedding_size": 8,
    }
    assert FCNExtractor(backbone).describe()["embedding_size"] is None
    assert isinstance(FCNExtractor(backbone).embedder, nn.Identity)


def test_refuses_bad_settings(backbone):
    with pytest.raises(ValueError, match="embedding_size: expected 1 or more, got 0"):
        FCNExtractor(backbone, embedding_size=0)
    with pytest.raises(ValueError, match="pyramid: expected at least one level"):
        FCNExtractor(backbone, pyramid=())
