import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from emd_retrieval.features import FCNExtractor, GridExtractor, load_backbone
from emd_retrieval.features.resnet12 import ResNet12


@pytest.mark.parametrize(
    ("name", "side", "cells", "stride"),
    [
        ("resnet12", 84, 5, 16),
        ("resnet12", 40, 2, 16),
        ("resnet12_stride8", 40, 5, 8),
        ("resnet12_stride8", 84, 10, 8),
    ],
)
def test_maps(name, side, cells, stride):
    backbone = load_backbone(name, pretrained=False)
    assert (backbone.name, backbone.channels, backbone.model.stride) == (name, 640, stride)
    assert backbone(torch.zeros(1, 3, side, side)).shape == (1, 640, cells, cells)


def test_normalisation_and_input_size_are_those_of_the_few_shot_protocol():
    backbone = load_backbone("resnet12", pretrained=False)
    assert backbone.input_size == 84
    assert backbone.mean == pytest.approx((0.4914, 0.4824, 0.4467), abs=1e-4)
    assert backbone.std == pytest.approx((0.2471, 0.2435, 0.2616), abs=1e-4)
    assert GridExtractor(backbone).patch_size == 84


def test_forward_by_hand(generator):
    """Three convolutions with their norms, the shortcut, leaky slope .1, pooling; four times."""
    torch.manual_seed(0)
    model = ResNet12().eval()
    state = model.state_dict()
    for key, value in state.items():
        if "running_var" in key or ("bn" in key and key.endswith("weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.3, generator=generator)
    model.load_state_dict(state)

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var"))
        return F.batch_norm(x, *parts, state[f"{name}.weight"], state[f"{name}.bias"])

    images = torch.randn(2, 3, 37, 32, generator=generator)
    x = images
    for layer in range(1, 5):
        block = f"layer{layer}.0"
        inner = x
        for place in (1, 2, 3):
            inner = norm(
                F.conv2d(inner, state[f"{block}.conv{place}.weight"], padding=1),
                f"{block}.bn{place}",
            )
            if place < 3:
                inner = torch.where(inner > 0, inner, 0.1 * inner)
        shortcut = norm(F.conv2d(x, state[f"{block}.downsample.0.weight"]), f"{block}.downsample.1")
        x = inner + shortcut
        x = F.max_pool2d(torch.where(x > 0, x, 0.1 * x), 2)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), x, rtol=1e-4, atol=1e-4)


def test_signals_keep_their_size_at_the_start(generator):
    torch.manual_seed(0)
    feature_map = (
        ResNet12().train().forward_features(torch.randn(4, 3, 84, 84, generator=generator))
    )
    assert 0.3 < feature_map.std() < 3


def test_parameters_are_those_of_the_literature():
    """12.4 million without the classifier."""
    assert sum(p.numel() for p in ResNet12().parameters()) == 12_424_320


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder."])
def test_checkpoints_of_the_reference_code_fit(prefix, tmp_path):
    torch.manual_seed(1)
    state = ResNet12().state_dict()
    saved = {prefix + name: value for name, value in state.items()}
    saved["fc.weight"] = torch.zeros(64, 640)
    torch.save({"params": saved}, tmp_path / "max_acc.pth")
    backbone = load_backbone("resnet12", weights=tmp_path / "max_acc.pth")
    assert all(torch.equal(backbone.model.state_dict()[name], state[name]) for name in state)


def test_weights_of_another_model_are_refused(tmp_path):
    state = {name: value for name, value in ResNet12().state_dict().items() if "layer4" not in name}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"w\.safetensors does not fit 'resnet12': 2\d missing \(l"
    ):
        load_backbone("resnet12", weights=tmp_path / "w.safetensors")


def test_there_are_no_weights_to_fetch():
    with pytest.raises(ValueError) as caught:
        load_backbone("resnet12")
    assert str(caught.value) == (
        "backbone: no hub has weights of 'resnet12'; pass a file: weights=FILE (--weights FILE), "
        "or pretrained=False for random ones"
    )
    with pytest.raises(
        ValueError,
        match=r"^backbone: expected a model of timm, got 'resnet_12'; nearest names: .*resnet12",
    ):
        load_backbone("resnet_12", pretrained=False)
    with pytest.raises(ValueError, match="layer: 'resnet12' offers no intermediate feature maps"):
        load_backbone("resnet12", pretrained=False, layer=1)


def test_as_an_extractor():
    backbone = load_backbone("resnet12", pretrained=False)
    extractor = FCNExtractor(backbone, pyramid=(), include_map=True).eval()
    with torch.no_grad():
        assert extractor(torch.zeros(1, 3, 84, 84)).shape == (1, 25, 640), "25 nodes, as the paper"


def test_narrow_blocks_keep_the_map():
    backbone = load_backbone("resnet12_stride8_256", pretrained=False)
    assert backbone(torch.zeros(1, 3, 40, 40)).shape == (1, 256, 5, 5)
