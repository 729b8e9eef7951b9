import pytest
import timm
import torch
from torch import Tensor, nn

from emd_retrieval.training.depthwise import DepthwiseInFloat32


def gradients(
    layer: nn.Conv2d, images: Tensor, *, bfloat16: bool = True, mode: bool = True
) -> list[Tensor]:
    """Of the images, the kernels and the bias, for a fixed gradient of the maps."""
    layer.zero_grad()
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        if mode:
            with DepthwiseInFloat32():
                maps = layer(images)
        else:
            maps = layer(images)
    assert maps.dtype == (torch.bfloat16 if bfloat16 else images.dtype)
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(1))
    maps.backward(weights.to(maps.dtype))
    wanted = [images, *layer.parameters()]
    assert all(one.grad is not None and one.grad.dtype == one.dtype for one in wanted)
    return [one.grad.clone() for one in wanted if one.grad is not None]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_convolution(
    kernel: int, stride: int | tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 12, kernel, stride, padding=kernel // 2, groups=12, bias=bias)
    images = torch.randn(3, 12, 17, 20).contiguous(memory_format=torch.channels_last)
    found = gradients(layer, images)
    exact = gradients(layer, images, bfloat16=False, mode=False)
    plain = gradients(layer, images, mode=False)
    for one, reference, usual in zip(found, exact, plain, strict=True):
        assert error(one, reference) < 0.01
        assert error(one, reference) < 1.5 * error(usual, reference) + 1e-4


def test_dilation_and_uneven_padding() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, (5, 3), (2, 1), padding=(3, 2), dilation=(1, 2), groups=6)
    images = torch.randn(2, 6, 15, 13)
    for one, reference in zip(
        gradients(layer, images), gradients(layer, images, bfloat16=False, mode=False), strict=True
    ):
        assert error(one, reference) < 0.01


@pytest.mark.parametrize(
    ("channels", "out", "groups", "kernel", "stride"),
    [(8, 8, 8, 3, 1), (8, 8, 4, 5, 2), (8, 16, 8, 5, 2), (8, 8, 1, 5, 2), (1, 1, 1, 5, 2)],
)
def test_other_convolutions_are_untouched(
    channels: int, out: int, groups: int, kernel: int, stride: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, out, kernel, stride, padding=1, groups=groups)
    images = torch.randn(2, channels, 11, 11)
    for one, usual in zip(
        gradients(layer, images), gradients(layer, images, mode=False), strict=True
    ):
        assert torch.equal(one, usual)


def test_without_bfloat16_it_is_untouched() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 5, 2, padding="valid", groups=8)
    images = torch.randn(2, 8, 11, 11)
    found = gradients(layer, images, bfloat16=False)
    for one, usual in zip(found, gradients(layer, images, bfloat16=False, mode=False), strict=True):
        assert torch.equal(one, usual)


def test_frozen_kernels_get_no_gradient() -> None:
    layer = nn.Conv2d(8, 8, 5, 2, padding=2, groups=8).requires_grad_(False)
    images = torch.randn(2, 8, 11, 11, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), DepthwiseInFloat32():
        layer(images).float().sum().backward()
    assert layer.weight.grad is None
    assert images.grad is not None
    assert bool(images.grad.abs().sum() > 0)


def test_a_whole_trunk_trains_alike() -> None:
    """As near to float32 as plain bfloat16 is, for kernels all over EfficientNet-Lite0."""
    torch.manual_seed(0)
    trunk = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def kernels_gradients(*, bfloat16: bool, mode: bool) -> Tensor:
        trunk.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            if mode:
                with DepthwiseInFloat32():
                    features = trunk(images)
            else:
                features = trunk(images)
        features.float().square().sum().backward()
        kernels = [m.weight.grad for m in trunk.modules() if isinstance(m, nn.Conv2d)]
        return torch.cat([one.flatten() for one in kernels if one is not None])

    exact = kernels_gradients(bfloat16=False, mode=False)
    plain = error(kernels_gradients(bfloat16=True, mode=False), exact)
    found = error(kernels_gradients(bfloat16=True, mode=True), exact)
    assert 0 < found < 1.5 * plain
