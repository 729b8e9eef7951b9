import numpy as np
import pytest
import torch
from PIL import Image

from emd_retrieval.features import load_backbone
from emd_retrieval.features.transforms import evaluation_transform, evaluation_view


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("resnet10t", pretrained=False)  # its mean and deviation differ


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_resizes_crops_and_normalises(backbone, picture):
    image = evaluation_transform(backbone, resize=45, crop=32)(picture)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    resized = picture.resize((70, 45), Image.Resampling.BICUBIC)
    cropped = np.asarray(resized.crop((19, 6, 51, 38)), dtype=np.float32) / 255
    expected = (cropped - np.float32(backbone.mean)) / np.float32(backbone.std)
    # torch and Pillow round the bicubic filter differently, by a grey level or two.
    difference = np.abs(image.permute(1, 2, 0).numpy() - expected)
    assert difference.mean() < 0.5 / 255 / min(backbone.std)
    assert difference.max() < 4 / 255 / min(backbone.std)


def test_a_grey_of_the_mean_becomes_zero(backbone):
    colour = tuple(round(255 * mean) for mean in backbone.mean)
    image = evaluation_transform(backbone, resize=16, crop=16)(Image.new("RGB", (20, 30), colour))
    assert image.abs().max() < 0.5 / 255 / min(backbone.std) + 1e-6


def test_the_view_is_what_the_network_saw(backbone, picture):
    view = evaluation_view(resize=45, crop=32)(picture)
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
    image = evaluation_transform(backbone, resize=45, crop=32)(picture)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    torch.testing.assert_close(
        (image * std + mean) * 255, torch.from_numpy(view).permute(2, 0, 1).float()
    )


@pytest.mark.parametrize(("resize", "crop"), [(32, 33), (32, 0), (32, -1)])
def test_a_crop_that_does_not_fit(backbone, resize, crop):
    with pytest.raises(ValueError, match=f"crop: expected 1 to resize = 32 pixels, got {crop}"):
        evaluation_transform(backbone, resize=resize, crop=crop)
