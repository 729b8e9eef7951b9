import pytest
import torch
import torch.nn.functional as F

from emd_retrieval.features import pyramid_pool
from emd_retrieval.features.pyramid import pyramid_boxes


def adaptive_nodes(feature_map, sizes, include_map):
    """torch's own adaptive pooling, level after level."""
    levels = [F.adaptive_avg_pool2d(feature_map, size).flatten(2) for size in sizes]
    if include_map:
        levels.append(feature_map.flatten(2))
    return torch.cat(levels, dim=2).mT


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (5, 5), (3, 3), (2, 5), (14, 9), (1, 1), (37, 4)])
@pytest.mark.parametrize("levels", [(3, 2, 1), (5, 2, 1), (1,), (4, 7), (2, 2)])
@pytest.mark.parametrize("include_map", [False, True])
def test_equals_adaptive_average_pooling(size, levels, include_map, generator):
    feature_map = torch.randn(2, 6, *size, generator=generator)
    got = pyramid_pool(feature_map, levels, include_map=include_map)
    expected = adaptive_nodes(feature_map, levels, include_map)
    torch.testing.assert_close(got, expected)


def test_order_of_nodes():
    """Row by row within a level, levels in the order given, the map's own cells last."""
    feature_map = torch.arange(4.0).view(1, 1, 2, 2)
    nodes = pyramid_pool(feature_map, (1, 2), include_map=True)
    assert nodes.flatten().tolist() == [1.5, 0, 1, 2, 3, 0, 1, 2, 3]


def test_the_map_alone(generator):
    feature_map = torch.randn(2, 6, 3, 4, generator=generator)
    nodes = pyramid_pool(feature_map, (), include_map=True)
    assert torch.equal(nodes, feature_map.flatten(2).mT)


def test_channels_last_maps_give_the_same_nodes(generator):
    feature_map = torch.randn(2, 6, 7, 7, generator=generator)
    torch.testing.assert_close(
        pyramid_pool(feature_map.to(memory_format=torch.channels_last), (3, 2, 1)),
        pyramid_pool(feature_map, (3, 2, 1)),
    )


def test_bfloat16_keeps_its_type_and_stays_close(generator):
    feature_map = torch.randn(2, 6, 7, 7, generator=generator)
    nodes = pyramid_pool(feature_map.bfloat16(), (3, 2, 1), include_map=True)
    assert nodes.dtype == torch.bfloat16
    expected = pyramid_pool(feature_map, (3, 2, 1), include_map=True)
    torch.testing.assert_close(nodes.float(), expected, rtol=0.02, atol=0.02)


def test_gradient(generator):
    feature_map = torch.randn(
        1, 2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, (3, 2, 1)), (feature_map,))


def test_trains_on_a_map_size_first_seen_in_inference_mode(generator):
    """What is kept between calls must not carry inference mode into training."""
    feature_map = torch.randn(1, 3, 11, 6, generator=generator)
    with torch.inference_mode():
        pyramid_pool(feature_map, (3, 2))
    leaf = feature_map.clone().requires_grad_()
    pyramid_pool(leaf, (3, 2)).square().sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("sizes", [(0,), (-1, 2), (1.5,), ("3",)])
def test_sizes_that_are_no_levels(sizes):
    with pytest.raises(ValueError, match="sizes: expected positive whole numbers, got"):
        pyramid_pool(torch.zeros(1, 2, 3, 3), sizes)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="sizes: expected at least one level, or include_map"):
        pyramid_pool(torch.zeros(1, 2, 3, 3), ())
    with pytest.raises(ValueError, match=r"feature_map: expected shape \[B, D, H, W\], got \[1, 2"):
        pyramid_pool(torch.zeros(1, 2, 3), (1,))
    with pytest.raises(TypeError, match="feature_map: expected a floating-point tensor"):
        pyramid_pool(torch.zeros(1, 2, 3, 3, dtype=torch.uint8), (1,))


def test_boxes_are_where_the_nodes_look():
    """Pooling a map that holds the cells' own places gives the centres of the boxes."""
    size = 12
    centres = (torch.arange(size) + 0.5) / size
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    nodes = pyramid_pool(torch.stack([columns, rows]).unsqueeze(0), (3, 2, 1))[0]
    boxes = pyramid_boxes((3, 2, 1))
    assert boxes.shape == (14, 4)
    torch.testing.assert_close((boxes[:, :2] + boxes[:, 2:]) / 2, nodes)
