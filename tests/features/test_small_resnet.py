import pytest
import torch

from emd_retrieval.features import FCNExtractor
from emd_retrieval.features.small_resnet import SmallResNet, small_backbone


@pytest.mark.parametrize(
    ("widths", "channels", "cells"),
    [((16, 24, 48, 96), 96, 8), ((4, 8), 8, 32), ((4, 4, 8), 8, 16)],
)
def test_shapes(widths, channels, cells):
    backbone = small_backbone(widths)
    assert backbone.channels == channels
    assert backbone.input_size == 64
    assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, channels, cells, cells)
    assert backbone.describe()["backbone"] == "small_resnet_" + "_".join(map(str, widths))


def test_the_seed_decides_the_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(small_backbone((4, 8)).state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_every_weight_learns(generator):
    torch.manual_seed(0)
    extractor = FCNExtractor(small_backbone((4, 8, 8)), pyramid=(2, 1), embedding_size=6).train()
    images = torch.randn(4, 3, 64, 64, generator=generator)
    target = torch.randn(4, 5, 6, generator=generator)
    (extractor(images) - target).square().sum().backward()
    for name, parameter in extractor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("widths", [(), (8,), (8, 0)])
def test_widths_that_make_no_network(widths):
    with pytest.raises(ValueError, match="widths: expected two or more positive numbers, got"):
        SmallResNet(widths)
