import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from emd_retrieval.datasets import ImageCollection, ImageDataset
from emd_retrieval.datasets.base import UnreadableImageError
from emd_retrieval.datasets.image_folder import load_image_folder
from emd_retrieval.features import FCNExtractor, FeatureSet, extract_features, load_backbone
from emd_retrieval.features.transforms import evaluation_transform


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return FCNExtractor(load_backbone("test_resnet", pretrained=False))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (7, 48, 64, 3), dtype=np.uint8)


def dataset_of(pictures, extractor, labels=(2, 0, 1, 1, 0, 2, 2)):
    collection = ImageCollection(
        "pictures", pictures, np.array(labels, dtype=np.int64), ("a", "b", "c"), (1, 2, 3)
    )
    return ImageDataset(collection, evaluation_transform(extractor.backbone, resize=48, crop=48))


def test_order_labels_and_rows(pictures, extractor):
    features = extract_features(dataset_of(pictures, extractor), extractor, batch_size=3)
    assert len(features) == 7
    assert features.labels.tolist() == [2, 0, 1, 1, 0, 2, 2]
    assert features.ids.tolist() == list(range(7))
    dataset = dataset_of(pictures, extractor)
    extractor.eval()
    for i in range(7):
        with torch.no_grad():
            nodes, pooled = extractor.with_global(dataset[i][0].unsqueeze(0))
        torch.testing.assert_close(features.nodes[i], nodes[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.global_vectors[i], pooled[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batch_size_does_not_matter(batch_size, pictures, extractor):
    dataset = dataset_of(pictures, extractor)
    expected = extract_features(dataset, extractor, batch_size=4)
    got = extract_features(dataset, extractor, batch_size=batch_size)
    torch.testing.assert_close(got.nodes, expected.nodes, rtol=1e-4, atol=1e-5)


def test_worker_processes_give_the_same(pictures, extractor):
    dataset = dataset_of(pictures, extractor)
    expected = extract_features(dataset, extractor, batch_size=2)
    got = extract_features(dataset, extractor, batch_size=2, num_workers=2)
    assert torch.equal(got.nodes, expected.nodes)
    assert torch.equal(got.ids, expected.ids)


def test_bfloat16_is_close_and_comes_back_as_float32(pictures, extractor):
    dataset = dataset_of(pictures, extractor)
    expected = extract_features(dataset, extractor)
    got = extract_features(dataset, extractor, bf16=True)
    assert got.nodes.dtype == got.global_vectors.dtype == torch.float32
    assert not torch.equal(got.nodes, expected.nodes), "bfloat16 was asked for"
    similarity = torch.cosine_similarity(got.nodes.flatten(1), expected.nodes.flatten(1))
    assert similarity.min() > 0.999


def test_features_can_take_part_in_training(pictures, extractor):
    features = extract_features(dataset_of(pictures, extractor), extractor)
    layer = torch.nn.Linear(extractor.channels, 4)
    layer(features.nodes).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("fails", [False, True])
def test_every_part_is_left_in_its_own_mode(fails, pictures):
    """Frozen batch norms, in evaluation mode inside a model in training, stay frozen."""
    extractor = FCNExtractor(load_backbone("test_resnet", pretrained=False)).train()
    frozen = [m for m in extractor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in frozen:
        norm.eval()
    means = [norm.running_mean.clone() for norm in frozen]
    if fails:
        next(extractor.parameters()).data.fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN"):
            extract_features(dataset_of(pictures, extractor), extractor)
    else:
        extract_features(dataset_of(pictures, extractor), extractor)
    assert extractor.training
    assert extractor.backbone.training
    assert not any(norm.training for norm in frozen)
    for norm, mean in zip(frozen, means, strict=True):
        assert torch.equal(norm.running_mean, mean)


def test_features_that_are_not_finite_are_named_by_row(pictures, extractor):
    dataset = dataset_of(pictures, extractor)

    class Broken(FCNExtractor):
        def with_global(self, images):
            nodes, pooled = super().with_global(images)
            nodes[(images == worst).flatten(1).all(dim=1)] = torch.inf
            return nodes, pooled

    worst = dataset[5][0]
    with pytest.raises(ValueError) as caught:
        extract_features(dataset, Broken(extractor.backbone), batch_size=4)
    assert str(caught.value) == (
        "features: the backbone gave NaN or infinite features for 1 image(s) of a batch, the "
        "first at row 5. Check the weights, or run without bf16"
    )


def test_an_empty_data_set(pictures, extractor):
    with pytest.raises(ValueError, match="dataset: expected at least one image, got none"):
        extract_features(dataset_of(pictures[:0], extractor, ()), extractor)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named(num_workers, pictures, extractor, tmp_path):
    for i, picture in enumerate(pictures):
        folder = tmp_path / ("wren" if i % 2 else "robin")
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    broken = tmp_path / "wren" / "3.png"
    broken.write_bytes(broken.read_bytes()[:400])
    transform = evaluation_transform(extractor.backbone, resize=48, crop=48)
    dataset = ImageDataset(load_image_folder(tmp_path), transform)
    with pytest.raises(UnreadableImageError, match=r"wren/3\.png: ") as caught:
        extract_features(dataset, extractor, batch_size=2, num_workers=num_workers)
    # Decoding processes that only the garbage collector ends take five seconds.
    traceback.clear_frames(caught.tb)


@pytest.fixture
def parts(generator):
    return {
        "nodes": torch.randn(4, 3, 8, generator=generator),
        "global_vectors": torch.randn(4, 5, generator=generator),
        "labels": torch.tensor([0, 0, 1, 1]),
        "ids": torch.arange(4),
    }


def test_subset(parts):
    features = FeatureSet(**parts)
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True, False])):
        part = features.subset(rows)
        for name, whole in parts.items():
            assert torch.equal(getattr(part, name), whole[rows])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nodes": torch.zeros(4, 8)}, ValueError, r"nodes: expected shape \[n, N, D\]"),
        (
            {"labels": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"labels: expected shape \[n\], with n = 4, got \[3\]",
        ),
        (
            {"global_vectors": torch.zeros(4, 5, dtype=torch.long)},
            TypeError,
            "global_vectors: expected a floating-point tensor",
        ),
        ({"ids": [0, 1, 2, 3]}, TypeError, r"ids: expected a torch\.Tensor, got list"),
    ],
)
def test_parts_that_do_not_fit(change, error, message, parts):
    with pytest.raises(error, match=message):
        FeatureSet(**{**parts, **change})
