import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from emd_retrieval.datasets import ImageCollection, ImageDataset
from emd_retrieval.features import (
    GridExtractor,
    SamplingExtractor,
    build_extractor,
    extract_features,
    load_backbone,
)
from emd_retrieval.features import patches as patches_module

NAMES = ("grid", "sampling")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone("test_resnet", pretrained=False)


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[:90, :130] / 9
    waves = np.stack([np.sin(x + i) + np.cos(y * (i + 1) / 2) for i in range(3)], axis=2)
    noise = np.random.default_rng(0).normal(0, 12, (90, 130, 3))
    return Image.fromarray((waves * 55 + 128 + noise).clip(0, 255).astype(np.uint8))


def build(name, backbone, **settings):
    return build_extractor(name, backbone, **{"patch_size": 32, "patches": 6, **settings}).eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def resized(picture, box, size, backbone):
    """A patch by Pillow, normalised. Shape: [3, size, size]."""
    patch = picture.crop(tuple(box)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(patch, dtype=np.float32) / 255
    pixels = (pixels - np.float32(backbone.mean)) / np.float32(backbone.std)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def cells_by_loop(size, levels, contexts):
    """Start and stop of each enlarged cell of one axis, level by level, unrounded."""
    spans = []
    for level, context in zip(levels, contexts, strict=True):
        cell = size / level
        spans.append(
            [
                (max(0, (i + 0.5) * cell - context * cell / 2),
                 min(size, (i + 0.5) * cell + context * cell / 2))
                for i in range(level)
            ]
        )  # fmt: skip
    return spans


@pytest.mark.parametrize("grid", [(3, 2), (1,), (2, 5, 1)])
@pytest.mark.parametrize("context", [1.0, 2.0, 3.3])
@pytest.mark.parametrize("size", [(90, 130), (333, 500), (7, 4)])
def test_grid_boxes(grid, context, size, backbone):
    height, width = size
    layout = GridExtractor(backbone, grid=grid, context=context).layout
    boxes = layout.evaluation(height, width, seeded(0))
    rows = cells_by_loop(height, grid, [context] * len(grid))
    columns = cells_by_loop(width, grid, [context] * len(grid))
    expected = [
        [column[0], row[0], column[1], row[1]]
        for level in range(len(grid))
        for row in rows[level]
        for column in columns[level]
    ]
    assert boxes.shape == (layout.count, 4)
    assert (boxes - torch.tensor(expected)).abs().max() <= 1, "to the pixel"
    if min(size) > 20:
        assert (boxes - torch.tensor(expected)).abs().max() <= 0.5 + 1e-9
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([width, height])).all()


def test_grid_without_context_tiles_the_image(backbone):
    boxes = GridExtractor(backbone, grid=(3,), context=1).layout.evaluation(100, 77, seeded(0))
    covered = torch.zeros(100, 77)
    for left, top, right, bottom in boxes.tolist():
        covered[top:bottom, left:right] += 1
    assert torch.equal(covered, torch.ones(100, 77))


def test_grid_training_draws_one_context_a_level(backbone):
    """x (1 + 2 U(0, 1)), as the reference code."""
    extractor = GridExtractor(backbone)
    low, high = extractor.layout.training_context
    assert (low, high) == (1, 3)
    sides = []
    for seed in range(300):
        boxes = extractor.layout.training(3000, 3000, seeded(seed))
        middle = boxes[4]  # of the level of three: never clamped in full
        contexts = [(middle[2] - middle[0]) / 1000, (boxes[9, 2] / 3000 - 0.25) * 4]
        sides.append([float(context) for context in contexts])
        expected = cells_by_loop(3000, (3, 2), sides[-1])
        got = torch.tensor([[boxes[i, 0], boxes[i, 2]] for i in (0, 1, 2, 9, 10)])
        assert (got - torch.tensor(expected[0] + expected[1])).abs().max() < 3
    three, two = np.array(sides).T
    assert 1 <= three.min() < 1.05
    assert 2.95 < three.max() <= 3
    assert abs(three.mean() - 2) < 0.12
    assert abs(np.corrcoef(three, two)[0, 1]) < 0.2, "levels are drawn apart"


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (40, 400)])
def test_sampling_boxes(shape, backbone):
    """Area, aspect ratio and place as RandomResizedCrop draws them."""
    height, width = shape
    layout = SamplingExtractor(backbone, patches=4000).layout
    boxes = layout.training(height, width, seeded(1)).double()
    left, top, right, bottom = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    w, h = right - left, bottom - top
    area, aspect = w * h / (width * height), w / h
    assert area.min() > 0.07
    assert area.max() <= 1
    assert aspect.min() > 0.7
    assert aspect.max() < 1.42
    if shape == (200, 300):
        small = area < 0.4  # all aspect ratios fit there
        assert abs(float((area[small] - 0.24).mean())) < 0.01, "areas are uniform"
        assert abs(float(aspect[small].log().mean())) < 0.02, "aspect ratios are log-uniform"
        free_x = (left / (width - w))[small & (width - w > 20)]
        assert abs(float(free_x.mean()) - 0.5) < 0.02, "places are uniform"
        assert free_x.min() == 0
        assert free_x.max() == 1


def test_sampling_where_nothing_fits(backbone):
    """The centre, at the nearest aspect ratio allowed."""
    layout = SamplingExtractor(backbone, patches=3, scale=(1, 1)).layout
    assert layout.training(40, 400, seeded(0)).tolist() == [[173, 0, 226, 40]] * 3
    assert layout.training(400, 40, seeded(0)).tolist() == [[0, 173, 40, 226]] * 3
    assert layout.training(1, 1, seeded(0)).tolist() == [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("crop", [56, None])
def test_views_are_the_boxes_of_the_picture(name, crop, backbone, picture):
    """Pixels of the image's own resolution, of its centre or the whole, cut by Pillow."""
    extractor = build(name, backbone)
    views = extractor.evaluation_transform(resize=64, crop=crop)(picture)
    assert views.shape == (extractor.num_nodes, 3, 32, 32)
    assert views.dtype == torch.float32
    side = round(90 * 56 / 64)
    field = (0, 0, 130, 90) if crop is None else ((130 - side) // 2, (90 - side) // 2)
    view = extractor.evaluation_view(resize=64, crop=crop)(picture)
    assert view.shape == ((90, 130, 3) if crop is None else (side, side, 3))
    assert view.dtype == np.uint8
    seen = picture.crop((*field[:2], field[0] + view.shape[1], field[1] + view.shape[0]))
    assert np.array_equal(view, np.asarray(seen))
    shares = extractor.node_boxes(picture, resize=64, crop=crop)
    assert shares.min() >= 0
    assert shares.max() <= 1
    boxes = shares.double() * torch.tensor([view.shape[1], view.shape[0]] * 2)
    boxes = (boxes + 0.5 + 1e-4).floor().int()
    for patch, box in zip(views, boxes.tolist(), strict=True):
        expected = resized(seen, box, 32, backbone)
        likeness = [(patch - some).abs().mean() for some in (expected, expected.flip(2))]
        assert min(likeness) < 0.02, "up to rounding, and mirrored at random by Sampling"
        if name == "grid":
            assert likeness[0] < 0.02, "Grid is never mirrored in evaluation"


def test_sampling_mirrors_some_patches_in_evaluation(backbone, picture):
    extractor = build("sampling", backbone, patches=40)
    views = extractor.evaluation_transform()(picture)
    view = Image.fromarray(extractor.evaluation_view()(picture))
    boxes = extractor.node_boxes(picture) * view.width
    mirrored = 0
    for patch, box in zip(views, boxes.round().int().tolist(), strict=True):
        expected = resized(view, box, 32, backbone)
        mirrored += bool((patch - expected).abs().mean() > (patch - expected.flip(2)).abs().mean())
    assert 8 <= mirrored <= 32


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_a_pure_function_of_the_pixels(name, backbone, picture):
    extractor = build(name, backbone)
    transform = extractor.evaluation_transform()
    first = transform(picture)
    torch.manual_seed(123)
    assert torch.equal(transform(picture.copy()), first), "whatever was drawn before"
    again = pickle.loads(pickle.dumps(transform))  # noqa: S301  as a data loader's process gets it
    assert torch.equal(again(picture), first)
    assert torch.equal(extractor.evaluation_transform(seed=0)(picture), first)


def test_sampling_depends_on_image_and_seed(backbone, picture):
    extractor = build("sampling", backbone)
    boxes = extractor.node_boxes(picture)
    assert extractor.node_boxes() is None, "every image has its own"
    assert torch.equal(extractor.node_boxes(picture), boxes)
    assert not torch.equal(extractor.node_boxes(picture, seed=1), boxes)
    seeds = [extractor.node_boxes(picture, seed=seed) for seed in (1, 2**32 + 1, 2**33)]
    assert not torch.equal(seeds[0], seeds[1]), "all of a large seed counts"
    assert not torch.equal(seeds[0], seeds[2])
    other = picture.copy()
    other.putpixel((3, 4), (0, 0, 0))
    assert not torch.equal(extractor.node_boxes(other), boxes)
    views = [extractor.evaluation_transform(seed=seed)(picture) for seed in (0, 1)]
    assert not torch.equal(*views)


@pytest.mark.parametrize("name", NAMES)
def test_training_follows_the_generator(name, backbone, picture):
    extractor = build(name, backbone)
    transform = pickle.loads(pickle.dumps(extractor.training_transform()))  # noqa: S301
    first = transform(picture, seeded(5))
    assert first.shape == extractor.evaluation_transform()(picture).shape
    torch.manual_seed(99)
    assert torch.equal(transform(picture, seeded(5)), first), "all randomness is the generator's"
    assert not torch.equal(transform(picture, seeded(6)), first)
    one = seeded(5)
    assert torch.equal(transform(picture, one), first)
    assert not torch.equal(transform(picture, one), first), "the generator moves on"


@pytest.mark.parametrize("name", NAMES)
def test_flips(name, backbone, picture):
    """Each patch by itself; without flips the same patches, none mirrored."""
    extractor = build(name, backbone, patches=13)
    plain, flipped = (
        extractor.training_transform(flip=flip)(picture, seeded(3)) for flip in (False, True)
    )
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 2 <= sum(mirrored) <= 11


@pytest.mark.parametrize("name", NAMES)
def test_trunk_embed_and_global(name, backbone, picture, monkeypatch):
    torch.manual_seed(0)
    extractor = build(name, backbone, embedding_size=12)
    views = extractor.evaluation_transform()(picture)
    views = torch.stack([views, views.flip(0) * 0.7])
    with torch.no_grad():
        nodes, pooled = extractor.trunk(views)
        count, channels = extractor.num_nodes, backbone.channels
        assert nodes.shape == (2, count, channels)
        each = [backbone(patch.unsqueeze(0)).mean(dim=(0, 2, 3)) for patch in views.flatten(0, 1)]
        expected = torch.stack(each).view(2, count, channels)
        torch.testing.assert_close(nodes, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled, expected.mean(dim=1), rtol=1e-4, atol=1e-5)
        now = extractor.with_global(views)
        torch.testing.assert_close(extractor.embed(nodes), now[0])
        torch.testing.assert_close(extractor.embed(pooled), now[1])
        torch.testing.assert_close(now[1], now[0].mean(dim=1), rtol=1e-4, atol=1e-5)
        assert extractor.global_node is None
        assert extractor.channels == now[0].shape[2] == 12
        monkeypatch.setattr(patches_module, "_PATCHES_AT_ONCE", 5)
        torch.testing.assert_close(extractor.trunk(views)[0], nodes, rtol=1e-4, atol=1e-5)


def test_norms_in_training_see_all_patches_at_once(picture, monkeypatch):
    backbone = load_backbone("test_resnet", pretrained=False)
    monkeypatch.setattr(patches_module, "_PATCHES_AT_ONCE", 2)
    extractor = build("grid", backbone)
    views = extractor.evaluation_transform()(picture).unsqueeze(0)
    seen = []
    handle = backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        with torch.no_grad():
            extractor.trunk(views)
        assert seen == [2] * 6 + [1], "in parts, to save memory"
        for whole in ("gradients", "norms in training"):
            seen.clear()
            with torch.set_grad_enabled(whole == "gradients"):
                backbone.train(whole == "norms in training")
                extractor(views)
            assert seen == [13], whole
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_features_of_a_collection(name, backbone, picture):
    """In any order, batch size and number of processes an image has the same features."""
    pictures = np.stack([np.roll(np.asarray(picture), shift, axis=1) for shift in range(0, 50, 10)])
    labels = np.array([0, 1, 0, 1, 1])
    collection = ImageCollection("p", pictures, labels, ("a", "b"), (1, 2))
    extractor = build(name, backbone)
    transform = extractor.evaluation_transform(resize=64, crop=64)
    features = extract_features(ImageDataset(collection, transform), extractor, batch_size=2)
    assert features.nodes.shape == (5, extractor.num_nodes, backbone.channels)
    torch.testing.assert_close(features.global_vectors, features.nodes.mean(dim=1))
    backwards = collection.subset([4, 3, 2, 1, 0])
    again = extract_features(
        ImageDataset(backwards, transform), extractor, batch_size=3, num_workers=1
    )
    torch.testing.assert_close(again.nodes.flip(0), features.nodes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 5)])
def test_images_of_any_size(name, size, backbone):
    image = Image.new("RGB", size, (200, 10, 30))
    extractor = build(name, backbone)
    for crop in (224, None):
        views = extractor.evaluation_transform(crop=crop)(image)
        assert views.shape == (extractor.num_nodes, 3, 32, 32)
        assert torch.allclose(views, views[:1, :, :1, :1]), "one colour stays one colour"
        extractor.training_transform(crop=crop)(image, seeded(0))


def test_patch_size_is_that_of_the_backbone(backbone):
    assert GridExtractor(backbone).patch_size == backbone.input_size == 160
    assert SamplingExtractor(backbone).patch_size == 160


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("grid", {"grid": ()}, "grid: expected at least one level, got none"),
        ("grid", {"grid": (3, 0)}, r"grid: expected positive whole numbers, got \[3, 0\]"),
        ("grid", {"context": 0.5}, r"context: expected 1 \(the cell alone\) or more, got 0.5"),
        ("grid", {"context": float("nan")}, "context: expected 1 .* got nan"),
        (
            "grid",
            {"training_context": (2, 1)},
            r"training_context: expected a range, 1 <= .*\[2, 1",
        ),
        ("grid", {"training_context": (0.5, 1)}, "training_context: expected a range"),
        ("grid", {"patch_size": 0}, "patch_size: expected a positive number, got 0"),
        ("sampling", {"patch_size": -3}, "patch_size: expected a positive number, got -3"),
        ("sampling", {"patches": 0}, "patches: expected a positive number, got 0"),
        ("sampling", {"scale": (0, 1)}, r"scale: expected a range of shares .* got \[0, 1\]"),
        ("sampling", {"scale": (0.5, 1.5)}, "scale: expected a range of shares"),
        ("sampling", {"scale": (0.5,)}, "scale: expected a range of shares"),
        (
            "sampling",
            {"ratio": (2, 1)},
            r"ratio: expected a range of width over height.* got \[2, 1",
        ),
        ("sampling", {"embedding_size": 0}, "embedding_size: expected 1 or more, got 0"),
    ],
)
def test_refuses_bad_settings(name, settings, message, backbone):
    with pytest.raises(ValueError, match=message):
        build(name, backbone, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_bad_views(name, backbone):
    extractor = build(name, backbone)
    for make in (extractor.evaluation_transform, extractor.training_transform):
        with pytest.raises(ValueError, match="crop: expected 1 to resize = 64 pixels, got 65"):
            make(resize=64, crop=65)
    with pytest.raises(
        ValueError, match=r"views: expected shape \[B, P, 3, h, w\], got \[2, 3, 32,"
    ):
        extractor(torch.zeros(2, 3, 32, 32))
