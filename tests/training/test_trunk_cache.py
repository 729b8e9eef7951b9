import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from training.recipes import small_birds, small_recipe

from emd_retrieval.datasets import ImageDataset, load_images
from emd_retrieval.features import extract_features
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.retrieval.store import StoreLockedError
from emd_retrieval.training import TrunkCache, build_model, embed_collection
from emd_retrieval.training.trunk_cache import FeatureTable, node_count


@pytest.fixture
def birds():
    return small_birds().select_classes("1-3")


@pytest.fixture
def cache(tmp_path):
    def make(**changes):
        settings = {"batch_size": 4, "workers": 0}
        own = {name: changes.pop(name) for name in list(changes) if name in ("patience",)}
        recipe = small_recipe(**changes)
        return TrunkCache(
            folder=tmp_path,
            extractor=build_model(recipe).extractor,
            views=recipe.views,
            **settings,
            **own,
        )

    return make


@pytest.mark.parametrize("method", ["fcn", "grid", "sampling"])
def test_the_store_holds_the_trunks_features(method, cache, birds):
    made = cache(model__method=method)
    store = made.store(birds)
    transform = made.extractor.evaluation_transform(resize=48, crop=40)
    views = torch.stack([transform(birds.load(row)) for row in range(len(birds))])
    with torch.inference_mode():
        nodes, pooled = made.extractor.trunk(views)
    torch.testing.assert_close(store.nodes(), nodes, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(store.global_vectors(), pooled, rtol=1e-4, atol=1e-5)
    assert store.nodes().shape[1] == node_count(made.extractor, made.views)


def test_who_needs_the_same_features_shares_them(cache, birds, tmp_path):
    def stores():
        return sorted(path.name for path in tmp_path.iterdir())

    cache().store(birds)
    first = stores()
    cache(
        loss={"name": "proxy_anchor"}, model__embedding_size=8, model__method="raw", views__cached=9
    ).store(birds)
    assert stores() == first
    for changes in (
        {"seed": 1},  # random weights are the seed's
        {"model__pyramid": [2]},
        {"views__crop": 36},
    ):
        before = len(stores())
        cache(**changes).store(birds)
        assert len(stores()) == before + 1, changes
    cache().store(birds.subset(range(5)))
    assert len(stores()) == 5


def test_views_differ_and_belong_to_their_numbers(cache, birds, tmp_path):
    made = cache()
    first, second = made.store(birds, 0).nodes(), made.store(birds, 1).nodes()
    assert (first - second).flatten(1).norm(dim=1).min() > 0
    other = replace(made, folder=tmp_path / "other").store(birds, 1).nodes()
    torch.testing.assert_close(second, other, rtol=0, atol=0)


def test_a_killed_cache_goes_on_where_it_stood(cache, birds, tmp_path, monkeypatch):
    whole = cache().store(birds).nodes()
    made = replace(cache(), folder=tmp_path / "killed")
    load = type(birds).load
    read = []

    def failing(self, row):
        read.append(row)
        if row == 10:
            raise KeyboardInterrupt
        return load(self, row)

    monkeypatch.setattr(type(birds), "load", failing)
    with pytest.raises(KeyboardInterrupt):
        made.store(birds)

    def counting(self, row):
        read.append(row)
        return load(self, row)

    monkeypatch.setattr(type(birds), "load", counting)
    read.clear()
    assert torch.equal(made.store(birds).nodes(), whole)
    assert read == list(range(8, len(birds))), "two batches of four were complete"
    read.clear()
    made.store(birds)
    assert read == []


@pytest.fixture
def half_filled(cache, birds, monkeypatch):
    """The path of a store whose writer was killed."""
    load = type(birds).load

    def failing(self, row):
        if row == 10:
            raise KeyboardInterrupt
        return load(self, row)

    made = cache()
    with monkeypatch.context() as patch:
        patch.setattr(type(birds), "load", failing)
        with pytest.raises(KeyboardInterrupt):
            made.store(birds)
    (path,) = made.folder.iterdir()
    return path


def test_who_waits_too_long_is_refused(cache, birds, half_filled):
    made = cache(patience=0.05)
    with (
        LocalFeatureStore.append_to(half_filled),
        pytest.raises(StoreLockedError, match="being written"),
    ):
        made.store(birds)


def test_who_waits_goes_on_when_the_other_is_done(cache, birds, half_filled):
    writer = LocalFeatureStore.append_to(half_filled)
    timer = threading.Timer(0.3, writer.close)
    timer.start()
    try:
        assert len(cache(patience=5).store(birds)) == len(birds)
    finally:
        timer.join()


def test_a_large_table_is_read_from_disk_and_says_the_same(cache, birds):
    made = cache()
    stores = [made.store(birds, view) for view in range(2)]
    rows, views = torch.tensor([3, 0, 3, 11]), torch.tensor([1, 0, 0, 1])
    in_memory = FeatureTable(stores, "nodes").at(rows, views)
    on_disk = FeatureTable(stores, "nodes", resident_bytes=0).at(rows, views)
    assert torch.equal(in_memory, on_disk)
    assert torch.equal(in_memory[0], stores[1].nodes([3])[0])
    means = FeatureTable(stores, "mean").at(rows, views)
    torch.testing.assert_close(means, in_memory.mean(dim=1))
    pooled = FeatureTable(stores, "pooled").at(rows, views)
    assert torch.equal(pooled[1], stores[0].global_vectors([0])[0])


def test_embedding_from_the_cache_is_embedding_the_images(birds, tmp_path):
    model = build_model(small_recipe())
    cached = embed_collection(model, birds, cache=tmp_path)
    plain = embed_collection(model, birds)
    torch.testing.assert_close(cached.nodes, plain.nodes, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(cached.global_vectors, plain.global_vectors, rtol=1e-3, atol=1e-4)
    assert torch.equal(cached.labels, plain.labels)
    transform = model.extractor.evaluation_transform(resize=48, crop=40)
    by_hand = extract_features(ImageDataset(birds, transform), model.extractor)
    assert torch.equal(by_hand.nodes, plain.nodes)


def test_features_that_are_not_finite_name_the_image(cache, birds):
    made = cache()
    with torch.no_grad():
        next(made.extractor.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite features for .*/0"):
        replace(made).store(birds)


def test_other_pixels_under_the_same_name_and_size_are_other_images(cache, tmp_path):
    folder = tmp_path / "images" / "wren"
    folder.mkdir(parents=True)

    def draw(level):
        image = Image.new("RGB", (48, 48), (level, 90, 120))
        image.save(folder / "1.bmp")  # no compression: every picture has the same size
        return load_images(folder.parent)

    one, other = (cache().store(draw(level)).nodes() for level in (40, 200))
    assert not torch.equal(one, other)
    assert torch.equal(cache().store(draw(40)).nodes(), one)
