import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from emd_retrieval.features import Backbone, load_backbone


def random_images(backbone, generator, count=2):
    return torch.randn(count, 3, backbone.input_size, backbone.input_size, generator=generator)


@pytest.mark.parametrize(
    ("name", "channels", "cells"),
    [
        ("resnet18", 512, 7),
        ("mobilenetv3_small_050", 288, 7),
        ("convnext_atto", 320, 7),
        ("vit_tiny_patch16_224", 192, 14),  # a class token before the grid
        ("deit_tiny_distilled_patch16_224", 192, 14),  # two tokens before the grid
        ("swin_tiny_patch4_window7_224", 768, 7),  # NHWC
        ("eva02_tiny_patch14_224", 192, 16),  # norm named after its pooling
    ],
)
def test_families(name, channels, cells, generator):
    """timm's own ``forward_intermediates`` says which feature belongs to which place."""
    backbone = load_backbone(name, pretrained=False)
    assert not backbone.training
    assert backbone.channels == channels
    images = random_images(backbone, generator, 1)
    with torch.no_grad():
        feature_map = backbone(images)
        (intermediate,) = backbone.model.forward_intermediates(
            images, indices=[-1], norm=True, intermediates_only=True, output_fmt="NCHW"
        )
    assert feature_map.shape == (1, channels, cells, cells)
    torch.testing.assert_close(feature_map, intermediate, rtol=1e-4, atol=1e-4)


def test_the_pooled_map_is_the_vector_of_the_model(generator):
    """EfficientNet's last 1x1 convolution comes after its last intermediate map."""
    backbone = load_backbone("tf_efficientnet_lite0", pretrained=False)
    assert backbone.channels == 1280
    images = random_images(backbone, generator)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).mean(dim=(2, 3)), backbone.model(images))


def test_images_need_not_be_square():
    backbone = load_backbone("resnet18", pretrained=False)
    assert backbone(torch.zeros(1, 3, 96, 160)).shape == (1, 512, 3, 5)
    backbone = load_backbone("test_vit", pretrained=False)
    assert backbone(torch.zeros(1, 3, 160, 192)).shape == (1, 64, 10, 12)


def test_images_of_a_size_that_the_model_refuses():
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 does not take images of 256 x 256 "):
        backbone(torch.zeros(1, 3, 256, 256))


def test_normalisation_is_the_models_own():
    lite = load_backbone("tf_efficientnet_lite0", pretrained=False)
    assert (lite.mean, lite.std) == ((0.5,) * 3, (0.5,) * 3)
    resnet = load_backbone("resnet18", pretrained=False)
    assert resnet.mean == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("resnet18", 3, (256, 14, 14)),
        ("resnet18", -2, (256, 14, 14)),
        ("resnet18", -1, (512, 7, 7)),
        ("tf_efficientnet_lite0", -1, (320, 7, 7)),
        ("swin_tiny_patch4_window7_224", 1, (192, 28, 28)),
        ("vit_tiny_patch16_224", 5, (192, 14, 14)),
    ],
)
def test_intermediate_layers(name, layer, shape):
    backbone = load_backbone(name, pretrained=False, layer=layer)
    assert backbone.channels == shape[0]
    assert backbone(torch.zeros(1, 3, 224, 224)).shape == (1, *shape)
    assert backbone.describe() == {"backbone": name, "layer": layer, "channels": shape[0]}


@pytest.mark.parametrize("layer", [5, -6, 99])
def test_layers_that_are_not_there(layer):
    with pytest.raises(ValueError) as caught:
        load_backbone("resnet18", pretrained=False, layer=layer)
    assert str(caught.value) == f"layer: 'resnet18' has feature maps 0 to 4, got {layer}"


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"^backbone: expected a model of timm, got 'resnet_18'; nearest names: .*resnet18",
    ):
        load_backbone("resnet_18", pretrained=False)
    with pytest.raises(ValueError, match=r"^backbone: expected a model of timm, got 'qqqqqqqq'$"):
        load_backbone("qqqqqqqq", pretrained=False)


def test_an_unknown_weights_tag_names_those_there_are():
    with pytest.raises(ValueError, match=r"'resnet50' has no weights 'v9' .* resnet50\.tv_in1k"):
        load_backbone("resnet50.v9")


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("pit_ti_224", 256),  # ends in its class token alone
        ("pit_ti_distilled_224", 256),  # in two of them
        ("crossvit_tiny_240", 192),  # in a list of two sets of tokens
        ("coat_lite_tiny", 320),  # in a class token before a grid, untold
        ("volo_d1_224", 384),
    ],
)
def test_models_without_a_map_at_their_end(name, channels):
    """What the error advises works."""
    with pytest.raises(ValueError) as caught:
        load_backbone(name, pretrained=False)
    said = str(caught.value)
    if not hasattr(timm.create_model(name), "forward_intermediates"):
        # Earlier releases of timm give no intermediate maps of some models.
        assert said == f"backbone: the output of {name} is no feature map; choose another model"
        return
    assert said == (
        f"backbone: the output of {name} is no feature map; take its last intermediate one: "
        "layer=-1 (--layer -1)"
    )
    backbone = load_backbone(name, pretrained=False, layer=-1)
    assert backbone.channels == channels
    images = torch.zeros(1, 3, backbone.input_size, backbone.input_size)
    assert backbone(images).shape[1:] in {(channels, 7, 7), (channels, 14, 14)}


def test_without_network_the_error_says_what_to_do(monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("Name or service not known\nand a second line")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    with pytest.raises(RuntimeError) as caught:
        load_backbone("resnet18")
    assert str(caught.value) == (
        "backbone: the weights of 'resnet18' could not be fetched from timm's hub "
        "(Name or service not known). Pass a local file instead: weights=FILE (--weights FILE)"
    )


@pytest.fixture(scope="module")
def weights():
    """The whole state of a small model, classifier included."""
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", pretrained=False)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pt", "checkpoint.pth"])
def test_weights_from_a_file(kind, weights, tmp_path, generator):
    file = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights} if kind == "checkpoint.pth" else weights, file)
    backbone = load_backbone("resnet10t", weights=file)
    assert "fc.weight" in weights
    model = timm.create_model("resnet10t", pretrained=False).eval()
    model.load_state_dict(weights)
    images = random_images(backbone, generator)
    with torch.no_grad():
        assert torch.equal(backbone(images), model.forward_features(images))


@pytest.mark.parametrize("name", ["levit_128s", "eva02_tiny_patch14_224", "convnext_atto"])
def test_the_whole_state_of_a_timm_model_fits(name, tmp_path):
    """Classifiers with a norm of their own, and norms that a change of pooling would rename."""
    model = timm.create_model(name, pretrained=False)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors"
    )
    assert isinstance(load_backbone(name, weights=tmp_path / "w.safetensors"), Backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv1.0.weight"), r"1 missing \(conv1\.0\.weight\)"),
        (lambda w: w.update(extra=torch.zeros(1)), r"1 unknown \(extra\)"),
        (
            lambda w: w.update({"conv1.0.weight": torch.zeros(2, 3, 3, 3)}),
            r"1 of another shape \(conv1\.0\.weight\)",
        ),
        (lambda w: w.clear(), r"\d+ missing \(bn1\.bias, bn1\.num_batches_tracked, .*, \.\.\.\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, weights, tmp_path):
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / "weights.pth")
    expected = rf"^weights: weights\.pth does not fit 'resnet10t': {message}\. It must hold"
    with pytest.raises(ValueError, match=expected):
        load_backbone("resnet10t", weights=tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "content", [b"", b"no weights at all", bytes(range(256)) * 12], ids=["empty", "text", "bytes"]
)
def test_a_file_that_holds_no_weights(suffix, content, tmp_path):
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^weights: weights\.{suffix} is not a readable weights"):
        load_backbone("resnet10t", weights=file)


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"epoch": 3}, torch.zeros(2)], ids=["list", "numbers", "tensor"]
)
def test_tensors_that_are_no_state(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"^weights: w\.pth holds no state dict \(names to"):
        load_backbone("resnet10t", weights=tmp_path / "w.pth")


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_code_in_a_weights_file_is_not_run(weights, tmp_path):
    trap = tmp_path / "executed"
    torch.save({**weights, "trap": Trap(str(trap))}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="is not a readable weights file"):
        load_backbone("resnet10t", weights=tmp_path / "weights.pth")
    assert not trap.exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert trap.exists(), "the trap itself works"


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="weights: no file"):
            load_backbone("resnet10t", weights=path)
