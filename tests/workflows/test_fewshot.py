"""``fewshot pretrain``, ``train`` and ``test`` from recipe files to records."""

from pathlib import Path

import pytest
import small_data

from emd_retrieval.workflows import (
    FewshotStage,
    FewshotTrial,
    Machine,
    fewshot_pretrain,
    fewshot_test,
    fewshot_train,
)
from emd_retrieval.workflows.fewshot_recipes import read_fewshot_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "fewshot"
SHIPPED = [
    path for path in sorted(RECIPES.glob("*.yaml")) if path.name not in ("base.yaml", "cpu.yaml")
]
BASE = """
data: {name: folder}
model: {backbone: test_resnet, patch_size: 32, patches: 2, grid: [2]}
views: {resize: 64, crop: 64}
pretraining: {steps: 2, batch_size: 6, learning_rate: 0.02}
meta_training: {way: 2, queries: 2, episodes: 2, validate_every: 2}
validation: {way: 2, queries: 2, episodes: 4}
test: {queries: 2, one_shot_episodes: 6, episodes: 4}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fewshot")
    for split, classes in (("train", ("a", "b", "c")), ("val", ("d", "e")), ("test", ("f", "g"))):
        small_data.write_images(folder / split, per_class=5, classes=classes)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, root):
    """A recipe with its two runs; features of tests are cached beside them."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "small.yaml"
    recipe.write_text(f"{BASE}notes: small\n")
    machine = Machine(cache=folder / "cache")
    common = {"recipe": recipe, "data": root, "machine": machine}
    fewshot_pretrain(FewshotStage(run=folder / "pre", **common))
    fewshot_train(FewshotStage(run=folder / "fcn", start=folder / "pre", **common))
    return folder, common


def test_a_run_is_tested(place, tmp_path):
    folder, common = place
    record = fewshot_test(
        FewshotTrial(
            run=folder / "fcn", output=tmp_path, ways=(2,), shots=(1, 2),
            classifiers=("nearest", "proto_net", "sfc"), **common,
        )
    )  # fmt: skip
    table = record.table
    assert list(table["classifier"]) == ["nearest", "proto_net", "sfc"] * 2
    assert list(table["shot"]) == [1, 1, 1, 2, 2, 2]
    assert list(table["episodes"]) == [6, 6, 6, 4, 4, 4]
    assert table["accuracy"].between(0, 100).all()
    assert (table["interval"] >= 0).all()
    assert {f.name for f in tmp_path.iterdir()} >= {"fewshot_test.json", "fewshot_test.md"}


@pytest.mark.parametrize("method", ["grid", "sampling"])
def test_other_extractors_of_a_pretrained_run(method, place, tmp_path):
    folder, common = place
    record = fewshot_test(
        FewshotTrial(run=folder / "pre", output=tmp_path, ways=(2,), method=method, **common)
    )
    assert record.settings["extractor"] == method
    assert list(record.table["classifier"]) == ["nearest"]


def test_across_domains_must_be_meant(place, root, tmp_path):
    folder, common = place
    birds = small_data.write_cub(tmp_path, range(1, 13), per_class=5)
    names = [line.split()[1] for line in (birds / "classes.txt").read_text().splitlines()]
    assert len(names) == 12
    with pytest.raises(ValueError, match=r"trained on folder; a test across domains must be asked"):
        fewshot_test(
            FewshotTrial(run=folder / "fcn", overrides=("data.name=cub",),
                         **{**common, "data": birds})
        )  # fmt: skip
    # Drawn birds have none of CUB's names, and the split says so.
    with pytest.raises(FileNotFoundError, match="none of the 50 species of the split 'test'"):
        fewshot_test(
            FewshotTrial(run=folder / "fcn", overrides=("data.name=cub",), across=True,
                         **{**common, "data": birds})
        )  # fmt: skip


def test_bad_input_before_the_work(place, root, tmp_path):
    folder, common = place
    for settings, message in [
        ({"shots": (4,), "ways": (2,)}, r"4 .*2"),
        ({"ways": (5,)}, r"way"),
        ({"classifiers": ("nearst",)}, r"did you mean 'nearest'"),
        ({"overrides": ("views.crop=32",)}, r"views\.crop: 32 here, 64 there"),
        ({"overrides": ("model.backbone=resnet12",)}, r"model\.backbone: 'resnet12' here"),
        ({"method": "gird"}, r"did you mean 'grid'"),
    ]:
        with pytest.raises(ValueError, match=message):
            fewshot_test(FewshotTrial(run=folder / "fcn", output=tmp_path, **settings, **common))
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        fewshot_test(FewshotTrial(run=tmp_path, **common))
    with pytest.raises(ValueError, match="expected the folder of a pre-trained run"):
        fewshot_train(FewshotStage(run=tmp_path / "x", **common))
    with pytest.raises(ValueError, match=r"expected the folder of folder, the recipe names none"):
        fewshot_pretrain(FewshotStage(run=tmp_path / "x", **{**common, "data": None}))
    with pytest.raises(FileNotFoundError, match="train"):
        fewshot_pretrain(FewshotStage(run=tmp_path / "x", **{**common, "data": tmp_path}))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["fcn", "grid", "sampling"])
def test_recipes_that_ship(path, method):
    recipe = read_fewshot_recipe(path, method=method)
    assert recipe.model.method == method
    assert path.stem.removesuffix("_cpu").removesuffix("_efficientnet_lite0") == recipe.data.name
    assert recipe.test.count(1) == 5000
    assert recipe.test.count(5) == 600
    assert len(recipe.notes.split()) > 20, "where the settings come from"
    if path.stem.endswith("_efficientnet_lite0"):
        assert recipe.model.backbone == "tf_efficientnet_lite0.in1k"
        assert recipe.model.weights is None
        assert recipe.pretraining.epochs == 0, "nothing is trained"
    elif not path.stem.endswith("_cpu"):
        assert recipe.model.backbone == "resnet12"
        assert recipe.meta_training.episodes == 5000
        assert (recipe.pretraining.epochs, recipe.pretraining.learning_rate) == (120, 0.1)
        assert recipe.views.crop == recipe.model.patch_size or method == "fcn"


def test_all_data_sets_ship():
    assert {path.stem for path in SHIPPED} == {
        "mini_imagenet", "tiered_imagenet", "cifar_fs", "fc100", "cub", "cifar_fs_cpu",
        "fc100_cpu", "cub_efficientnet_lite0",
    }  # fmt: skip
