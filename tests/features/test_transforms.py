import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from emd_retrieval.features import FCNExtractor, crop_resize, load_backbone
from emd_retrieval.features.transforms import (
    evaluation_transform,
    evaluation_view,
    random_boxes,
    training_transform,
)


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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_training_views_by_hand(backbone, picture):
    """Resize as in evaluation, a random box of it, a flip, the same normalisation."""
    transform = training_transform(backbone, resize=45, crop=32, scale=(0.2, 0.9), flip=False)
    view = transform(picture, seeded(4))
    assert view.shape == (3, 32, 32)
    assert view.dtype == torch.float32
    pixels = torch.from_numpy(np.array(picture.resize((70, 45), Image.Resampling.BICUBIC)))
    box = random_boxes(45, 70, 1, (0.2, 0.9), (3 / 4, 4 / 3), seeded(4))
    cut = crop_resize(pixels.permute(2, 0, 1).unsqueeze(0), box.unsqueeze(0), 32)[0, 0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    expected = (cut.float() / 255 - mean) / std
    assert (view - expected).abs().mean() < 1 / 255 / min(backbone.std)


def test_training_follows_the_generator(backbone, picture):
    transform = training_transform(backbone, resize=45, crop=32)
    transform = pickle.loads(pickle.dumps(transform))  # noqa: S301  as another process gets it
    first = transform(picture, seeded(1))
    torch.manual_seed(7)
    assert torch.equal(transform(picture, seeded(1)), first)
    assert not torch.equal(transform(picture, seeded(2)), first)
    plain = training_transform(backbone, resize=45, crop=32, flip=False)
    pairs = [(transform(picture, seeded(s)), plain(picture, seeded(s))) for s in range(40)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in pairs]
    assert all(torch.equal(a, b) or flip for (a, b), flip in zip(pairs, mirrored, strict=True))
    assert 8 <= sum(mirrored) <= 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": 0}, "resize: expected 1 pixel or more, got 0"),
        ({"crop": -2}, "crop: expected 1 pixel or more, got -2"),
        ({"scale": (0.5, 0.2)}, "scale: expected a range of shares of the image"),
        ({"ratio": (0, 1)}, "ratio: expected a range of width over height"),
    ],
)
def test_training_settings_that_are_none(settings, message, backbone):
    with pytest.raises(ValueError, match=message):
        training_transform(backbone, **settings)


def test_the_extractor_hands_its_transforms_out(backbone, picture):
    extractor = FCNExtractor(backbone)
    image = extractor.evaluation_transform(resize=45, crop=32, seed=3)(picture)
    assert torch.equal(image, evaluation_transform(backbone, resize=45, crop=32)(picture))
    view = extractor.training_transform(resize=45, crop=32)(picture, seeded(1))
    expected = training_transform(backbone, resize=45, crop=32)(picture, seeded(1))
    assert torch.equal(view, expected)
    seen = extractor.evaluation_view(resize=45, crop=32)(picture)
    assert np.array_equal(seen, evaluation_view(45, 32)(picture))
    for make in (
        extractor.evaluation_transform, extractor.training_transform, extractor.evaluation_view,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="crop: expected a side in pixels, got None"):
            make(crop=None)


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (5, 4000), (1, 1)])
def test_of_very_long_images_the_middle_is_seen(backbone, size):
    """Resized whole, the first would take 6 GB."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    sides = [min(side, 16 * min(size)) for side in size]
    left, top = ((side - kept) // 2 for side, kept in zip(size, sides, strict=True))
    middle = picture.crop((left, top, left + sides[0], top + sides[1]))
    seen = [evaluation_view(resize=256, crop=224)(image) for image in (picture, middle)]
    np.testing.assert_array_equal(*seen)
    train = training_transform(backbone, resize=256, crop=224)
    drawn = [train(image, torch.Generator().manual_seed(0)) for image in (picture, middle)]
    torch.testing.assert_close(*drawn)
    assert drawn[0].shape == (3, 224, 224)
