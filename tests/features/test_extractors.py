import pytest
import torch
from torch import nn

from emd_retrieval.features import (
    EXTRACTORS,
    Extractor,
    FCNExtractor,
    GridExtractor,
    SamplingExtractor,
    build_extractor,
    load_backbone,
    pyramid_pool,
)


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
    extractor = FCNExtractor(backbone, pyramid=(3, 2))
    assert extractor.node_boxes().shape == (13, 4)
    assert extractor.num_nodes == 13
    extractor = FCNExtractor(backbone, pyramid=(2,), include_map=True).train()
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    for crop in (64, 96):
        with torch.no_grad():
            nodes = extractor.eval()(torch.rand(1, 3, crop, crop))
        boxes = extractor.train().node_boxes(crop=crop)
        assert boxes.shape == (nodes.shape[1], 4)
        areas = (boxes[4:, 2:] - boxes[4:, :2]).prod(dim=1)
        torch.testing.assert_close(areas.sum(), torch.tensor(1.0))
    assert extractor.training
    for name, value in extractor.state_dict().items():
        assert torch.equal(value, before[name]), "asking changes nothing"
    assert extractor.num_nodes is None, "as many as the map has cells"


@pytest.mark.parametrize(
    "settings", [{}, {"pyramid": (3, 2)}, {"pyramid": (), "include_map": True}]
)
def test_what_the_trunk_gives_can_be_embedded_later(settings, backbone, images):
    torch.manual_seed(0)
    extractor = FCNExtractor(backbone, embedding_size=16, **settings).eval()
    with torch.no_grad():
        nodes, pooled = extractor.trunk(images)
        assert nodes.shape[2] == pooled.shape[1] == backbone.channels
        now = extractor.with_global(images)
        torch.testing.assert_close(extractor.embed(nodes), now[0])
        torch.testing.assert_close(extractor.embed(pooled), now[1])
        torch.testing.assert_close(extractor(images), now[0])


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
    with pytest.raises(
        ValueError, match=r"views: expected shape \[B, 3, h, w\], got \[2, 13, 3, 8, 8"
    ):
        FCNExtractor(backbone)(torch.zeros(2, 13, 3, 8, 8))


@pytest.mark.parametrize("name", EXTRACTORS)
def test_build_by_name(name, backbone):
    settings = {
        "pyramid": (2, 1), "include_map": True, "grid": (4,), "patches": 7, "patch_size": 48,
        "context": 1.5, "training_context": (1.2, 1.8), "scale": (0.2, 0.5), "ratio": (1.0, 2.0),
        "embedding_size": 8,
    }  # fmt: skip
    extractor = build_extractor(name, backbone, **settings)
    assert isinstance(extractor, Extractor)
    assert extractor.name == name
    own = {
        "fcn": (FCNExtractor, {"pyramid": [2, 1], "include_map": True}),
        "grid": (GridExtractor, {"grid": [4], "patch_size": 48, "context": 1.5,
                                 "training_context": [1.2, 1.8]}),
        "sampling": (SamplingExtractor, {"patches": 7, "patch_size": 48, "scale": [0.2, 0.5],
                                         "ratio": [1.0, 2.0]}),
    }  # fmt: skip
    kind, expected = own[name]
    assert type(extractor) is kind
    assert extractor.describe() == {
        "extractor": name, **backbone.describe(), **expected, "embedding_size": 8,
    }  # fmt: skip


def test_the_defaults_are_the_papers(backbone):
    assert [build_extractor(name, backbone).num_nodes for name in EXTRACTORS] == [14, 13, 25]


def test_an_unknown_name_names_the_nearest(backbone):
    with pytest.raises(ValueError) as caught:
        build_extractor("samplng", backbone)
    assert str(caught.value) == (
        "extractor: expected one of fcn, grid, sampling; got 'samplng' (did you mean 'sampling'?)"
    )
