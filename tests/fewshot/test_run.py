"""Pre-training and meta-training on drawn images: they learn, go on bit for bit, refuse what is
not theirs."""

import dataclasses

import numpy as np
import pytest
import small_data
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from emd_retrieval.datasets.fewshot import load_fewshot
from emd_retrieval.features.transforms import Normalisation
from emd_retrieval.fewshot.recipe import (
    FewshotRecipe,
    FewshotViews,
    MetaTraining,
    Pretraining,
    fewshot_recipe_from_dict,
)
from emd_retrieval.fewshot.run import (
    load_fewshot_run,
    meta_train,
    pretrain,
    read_fewshot_log,
    with_extractor,
)
from emd_retrieval.fewshot.stages import MetaTrainingStage, rotate
from emd_retrieval.fewshot.views import DecodedViews, MemoryViews, resident_pixels, training_views
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import StoreLockedError
from emd_retrieval.training import NonFiniteLossError
from emd_retrieval.training.run_lock import only_writer

SMALL = {
    "data": {"name": "folder"},
    "model": {
        "backbone": small_data.BACKBONE,
        "patch_size": 32,
        "patches": 2,
        "grid": [1, 2],
    },
    "views": {"resize": 64, "crop": 64},
    "pretraining": {"steps": 4, "batch_size": 6, "learning_rate": 0.02},
    "meta_training": {"way": 2, "queries": 2, "episodes": 4, "validate_every": 2},
    "validation": {"way": 2, "queries": 2, "episodes": 4},
}


def recipe_of(**sections):
    seed = sections.pop("seed", 0)
    merged = {
        name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}
    }
    merged["seed"] = seed
    return fewshot_recipe_from_dict(merged)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three splits of two or three classes each; not to be written to."""
    folder = tmp_path_factory.mktemp("fewshot")
    for split, classes in (("train", ("a", "b", "c")), ("val", ("d", "e")), ("test", ("f", "g"))):
        small_data.write_images(folder / split, per_class=4, classes=classes)
    return folder


@pytest.fixture(scope="module")
def splits(root):
    return {split: load_fewshot("folder", root, split) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, splits):
    run = tmp_path_factory.mktemp("runs") / "pre"
    return pretrain(
        recipe_of(), run, data=splits["train"], validation=splits["val"], description=None
    )


def run_pretrain(recipe, folder, splits):
    return pretrain(
        recipe, folder, data=splits["train"], validation=splits["val"], description=None
    )


def run_meta(recipe, folder, splits, start):
    return meta_train(
        recipe,
        folder,
        data=splits["train"],
        start=start,
        validation=splits["val"],
        description=None,
    )


class KilledError(Exception):
    pass


def kill_at(monkeypatch, kind, number):
    """The process dies when the batch of this number is wanted."""
    finish = kind.finish

    def dying(self, place, fetched):
        if place == number:
            raise KilledError
        return finish(self, place, fetched)

    monkeypatch.setattr(kind, "finish", dying)


def test_pretraining_leaves_a_model(pretrained):
    assert pretrained.summary["stage"] == "pretrain"
    assert pretrained.summary["steps"] == 4
    assert pretrained.summary["best_step"] in (2, 4)
    assert 0 <= pretrained.summary["validation"]["validation"] <= 100
    assert {file.name for file in pretrained.path.iterdir()} >= {
        "model.safetensors", "recipe.yaml", "run.json", "log.csv",
    }  # fmt: skip
    again = load_fewshot_run(pretrained.path)
    assert again.recipe == recipe_of()
    for name, value in pretrained.extractor.state_dict().items():
        assert torch.equal(value, again.extractor.state_dict()[name])
    untrained = dataclasses.replace(recipe_of(), seed=0)
    assert untrained.differences(again.recipe, "pretrain") == {}
    log = read_fewshot_log(pretrained.path)
    assert [row["step"] for row in log if row["loss"]] == ["1", "4"]
    assert [row["step"] for row in log if row["validation"]] == ["2", "4"]


def test_pretraining_goes_on_bit_for_bit(pretrained, splits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, MemoryViews, 3)
        with pytest.raises(KilledError):
            run_pretrain(recipe_of(), tmp_path / "run", splits)
    assert not (tmp_path / "run" / "run.json").exists()
    run = run_pretrain(recipe_of(), tmp_path / "run", splits)
    assert run.summary["validation"] == pretrained.summary["validation"]
    assert run.summary["best_step"] == pretrained.summary["best_step"]
    for name, value in pretrained.extractor.state_dict().items():
        assert torch.equal(value, run.extractor.state_dict()[name]), name


def test_a_finished_run_is_loaded_not_trained(pretrained, splits, monkeypatch):
    kill_at(monkeypatch, MemoryViews, 0)
    assert run_pretrain(recipe_of(), pretrained.path, splits).summary == pretrained.summary


@pytest.mark.parametrize("method", ["fcn", "grid", "sampling"])
def test_meta_training_goes_on_bit_for_bit(method, pretrained, splits, tmp_path, monkeypatch):
    recipe = recipe_of(
        model={**SMALL["model"], "method": method}, meta_training={
            **SMALL["meta_training"], "learning_rate": 0.05, "accumulate": 2,
        },
    )  # fmt: skip
    whole = run_meta(recipe, tmp_path / "whole", splits, pretrained)
    assert whole.summary["steps"] == 2
    assert whole.extractor.name == method
    with monkeypatch.context() as patch:
        kill_at(patch, MemoryViews if method == "fcn" else DecodedViews, 3)
        with pytest.raises(KilledError):
            run_meta(recipe, tmp_path / "killed", splits, pretrained)
    assert (tmp_path / "killed" / "checkpoint.ckpt").is_file()
    resumed = run_meta(recipe, tmp_path / "killed", splits, pretrained)
    assert resumed.summary["validation"] == whole.summary["validation"]
    for name, value in whole.extractor.state_dict().items():
        assert torch.equal(value, resumed.extractor.state_dict()[name]), name
    if whole.summary["best_step"] == 0:
        after = load_file(tmp_path / "killed" / "model.safetensors")
        before = pretrained.extractor.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_killed_run_goes_on_from_the_same_weights_only(pretrained, splits, tmp_path, monkeypatch):
    other = run_pretrain(recipe_of(seed=1), tmp_path / "other", splits)
    recipe = recipe_of()
    with monkeypatch.context() as patch:
        kill_at(patch, MemoryViews, 3)
        with pytest.raises(KilledError):
            run_meta(recipe, tmp_path / "run", splits, pretrained)
    with pytest.raises(ValueError, match=r"started from other weights"):
        run_meta(recipe, tmp_path / "run", splits, other)
    run_meta(recipe, tmp_path / "run", splits, pretrained)
    with pytest.raises(ValueError, match=r"started from other weights"):
        run_meta(recipe, tmp_path / "run", splits, other)


@pytest.mark.parametrize("gradient", ["exact", "detached", "qp"])
def test_the_gradient_is_a_choice(gradient):
    matcher = recipe_of(
        meta_training={**SMALL["meta_training"], "gradient": gradient}
    ).meta_training.matcher(EMDMatcher())
    assert matcher.weight_gradient is (gradient != "detached")
    assert matcher.solver == ("qp" if gradient == "qp" else "simplex")


@pytest.mark.parametrize("classifier", ["nearest", "proto_net", "knn", "prediction_fusion"])
def test_every_classifier_moves_the_network(classifier, pretrained, splits, tmp_path):
    recipe = recipe_of(
        meta_training={
            **SMALL["meta_training"], "classifier": classifier, "learning_rate": 0.01,
            "episodes": 1,
        },
        validation={"episodes": 0},
    )  # fmt: skip
    run = meta_train(
        recipe, tmp_path / "run", data=splits["train"], start=pretrained, description=None
    )
    before, after = pretrained.extractor.state_dict(), run.extractor.state_dict()
    assert any(not torch.equal(before[n], after[n]) for n in before if n.endswith("conv1.weight"))
    assert run.summary["validation"] is None


def test_frozen_batch_norms_stay(pretrained, splits, tmp_path):
    recipe = recipe_of(
        model={**SMALL["model"], "frozen_batch_norm": True}, validation={"episodes": 0}
    )
    stage = MetaTrainingStage(
        with_extractor(pretrained, recipe), None, recipe.meta_training, None,
        seed=0, frozen_batch_norm=True,
    )  # fmt: skip
    stage.train()
    norms = [part for part in stage.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(part.training for part in norms)
    assert stage.extractor.backbone.training


def test_pretraining_learns_the_statistics_of_batch_norms(splits, tmp_path):
    recipe = recipe_of(pretraining={"steps": 2}, validation={"episodes": 0})
    run = pretrain(recipe, tmp_path / "run", data=splits["train"], description=None)
    state = load_file(run.path / "model.safetensors")
    norms = [name for name in state if name.endswith("running_mean")]
    assert norms
    for name in norms:
        assert state[name].abs().max() > 0, name
    assert not run.extractor.training


@pytest.mark.parametrize("rotation", ["none", "augmentation", "self_supervision"])
def test_rotations_change_what_is_learned(rotation, pretrained, splits, tmp_path):
    recipe = recipe_of(
        pretraining={**SMALL["pretraining"], "steps": 1, "rotation": rotation},
        validation={"episodes": 0},
    )
    run = pretrain(recipe, tmp_path / "run", data=splits["train"], description=None)
    loss = float(read_fewshot_log(run.path)[0]["loss"])
    # Untrained heads: log 3 over the classes, and half of log 4 over the rotations.
    expected = np.log(3) + (0.5 * np.log(4) if rotation == "self_supervision" else 0)
    assert abs(loss - expected) < 0.35


def test_turns_are_quarters(generator):
    views = torch.rand(4, 3, 5, 5, generator=generator)
    turned = rotate(views, torch.tensor([0, 1, 2, 3]))
    for quarter in range(4):
        assert torch.equal(turned[quarter], torch.rot90(views[quarter], quarter, dims=(1, 2)))


def test_a_whole_image_as_its_own_crop_is_resized(generator):
    pixels = torch.randint(256, (3, 3, 20, 20), generator=generator, dtype=torch.uint8)
    views = FewshotViews(resize=32, crop=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    source = MemoryViews(pixels, views, Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), seed=0)
    got = source.finish(0, source.fetch(0, torch.tensor([2, 0])))
    whole = F.interpolate(pixels[[2, 0]].float(), size=32, mode="bilinear", align_corners=False)
    expected = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(whole)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_crops_lie_where_they_are_said_to_lie(generator):
    """The pixels are their own coordinates, so a crop shows where it was taken."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    pixels = torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8).expand(8, -1, -1, -1)
    views = FewshotViews(resize=16, crop=16, scale=(0.2, 0.5))
    source = MemoryViews(pixels, views, Normalisation((0.0,) * 3, (1 / 255,) * 3), seed=3)
    crops = source.finish(7, pixels)
    assert torch.equal(crops, source.finish(7, pixels))
    assert not torch.equal(crops, source.finish(8, pixels))
    horizontal = crops[:, 0, 8]
    widths = (horizontal[:, -1] - horizontal[:, 0]) * 16 / 15
    heights = (crops[:, 1, -1, 8] - crops[:, 1, 0, 8]) * 16 / 15
    shares = widths.abs() * heights / 2400
    assert ((shares > 0.17) & (shares < 0.53)).all()
    assert (widths < 0).any(), "none was mirrored"
    assert (widths > 0).any(), "all were mirrored"


def test_what_fits_is_held_in_memory(splits, pretrained):
    pixels = resident_pixels(splits["train"])
    assert pixels.shape == (12, 3, 48, 56)
    loaded = np.asarray(splits["train"].load(5))
    assert torch.equal(pixels[5], torch.from_numpy(loaded.copy()).permute(2, 0, 1))
    assert resident_pixels(splits["train"], resident_bytes=1000) is None
    views = FewshotViews(resize=64, crop=64)
    assert isinstance(training_views(splits["train"], pretrained.extractor, views, 0), MemoryViews)
    # Bilinear resizing to less than half would skip pixels.
    views = FewshotViews(resize=64, crop=20)
    assert isinstance(training_views(splits["train"], pretrained.extractor, views, 0), DecodedViews)


def test_half_precision_files_are_half_as_large(pretrained, splits, tmp_path):
    recipe = recipe_of(model={**SMALL["model"], "saved": "float16"}, validation={"episodes": 0})
    run = meta_train(
        recipe, tmp_path / "run", data=splits["train"], start=pretrained, description=None
    )
    small = (run.path / "model.safetensors").stat().st_size
    large = (pretrained.path / "model.safetensors").stat().st_size
    assert small < 0.65 * large


def test_schedules():
    steps = Pretraining(epochs=4, batch_size=10, drop_every=2, factor=0.2)
    assert steps.num_steps(105) == 40
    assert [steps.rate(step, 105) for step in (0, 19, 20, 39)] == [1.0, 1.0, 0.2, 0.2]
    cosine = dataclasses.replace(steps, schedule="cosine")
    assert cosine.rate(0, 105) == 1.0
    assert cosine.rate(20, 105) == pytest.approx(0.5)
    meta = MetaTraining(accumulate=4, drop_every=500)
    assert meta.steps == 1250
    assert [meta.rate(step) for step in (0, 124, 125, 250)] == [1.0, 1.0, 0.5, 0.25]


def test_stages_depend_on_their_own_settings():
    recipe = FewshotRecipe()
    other = dataclasses.replace(recipe, meta_training=MetaTraining(episodes=10))
    assert recipe.differences(other, "pretrain") == {}
    assert recipe.differences(other, "train") == {"meta_training.episodes": (5000, 10)}
    model = dataclasses.replace(recipe.model, method="grid")
    assert recipe.differences(dataclasses.replace(recipe, model=model), "pretrain") == {}
    matching = dataclasses.replace(recipe.matching, memory_mb=7.0)
    chunks = dataclasses.replace(recipe, matching=matching)
    assert recipe.of_stage("pretrain") == chunks.of_stage("pretrain")
    assert recipe.of_stage("train") == chunks.of_stage("train")


def test_recipes_come_back_from_their_yaml():
    recipe = recipe_of()
    assert fewshot_recipe_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"name": "mini_imagenett"}}, r"did you mean 'mini_imagenet'"),
        ({"model": {"method": "raw"}}, r"model\.method: .*got 'raw'"),
        ({"model": {"embedding_size": 5}}, r"expected null and false, got 5 and false"),
        ({"pretraining": {"epoch": 3}}, r"pretraining\.epoch: .*did you mean 'epochs'"),
        ({"pretraining": {"rotation": "yes"}}, r"pretraining\.rotation: "),
        ({"meta_training": {"classifier": "sfc"}}, r"'sfc' is learned from the support images"),
        ({"meta_training": {"episodes": 5, "accumulate": 2}}, r"a multiple of accumulate = 2"),
        ({"meta_training": {"gradient": "exactly"}}, r"meta_training\.gradient: "),
        ({"validation": {"episodes": -1}}, r"validation\.episodes: "),
        ({"test": {"queries": 0}}, r"test\.queries: "),
        ({"test": {"images_per_class": 0}}, r"test\.images_per_class: "),
        ({"pretraining": {"epochs": 0}}, r"pretraining\.epochs: .*'random', got 0"),
    ],
)
def test_bad_settings(sections, message):
    with pytest.raises(ValueError, match=message):
        fewshot_recipe_from_dict(sections)


def test_no_epochs_take_the_weights_as_they_come(splits, tmp_path):
    weights = small_data.write_weights(tmp_path / "weights.safetensors", seed=3)
    recipe = recipe_of(
        model={**SMALL["model"], "weights": None},
        pretraining={"epochs": 0, "steps": None, "batch_size": 6},
        validation={"episodes": 0},
    )
    run = pretrain(recipe, tmp_path / "run", data=splits["train"], weights=weights)
    assert run.summary["steps"] == 0
    given = load_file(weights)
    for name, value in run.extractor.backbone.state_dict().items():
        key = name.removeprefix("model.")
        assert torch.equal(value, given[key]), name
    again = pretrain(recipe, tmp_path / "run", data=splits["train"], weights=weights)
    assert again.summary == run.summary
    others = small_data.write_weights(tmp_path / "others.safetensors", seed=4)
    with pytest.raises(
        ValueError, match=r"run: .* started from other weights than those of .*others"
    ):
        pretrain(recipe, tmp_path / "run", data=splits["train"], weights=others)


def test_what_does_not_fit_fails_before_training(pretrained, splits, tmp_path, monkeypatch):
    kill_at(monkeypatch, MemoryViews, 0)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"queries"):
        run_meta(
            recipe_of(meta_training={**SMALL["meta_training"], "queries": 4}),
            folder, splits, pretrained,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"way"):
        run_pretrain(recipe_of(validation={"way": 3, "episodes": 2}), folder, splits)
    with pytest.raises(ValueError, match=r"views\.crop: 32 here, 64 there"):
        run_meta(recipe_of(views={"resize": 64, "crop": 32}), folder, splits, pretrained)
    with pytest.raises(ValueError, match=r"data\.name: 'cub' here, 'folder' there"):
        run_meta(recipe_of(data={"name": "cub"}), folder, splits, pretrained)
    with pytest.raises(ValueError, match=r"validation: expected images"):
        pretrain(recipe_of(), folder, data=splits["train"], description=None)
    assert not folder.exists()


def test_a_folder_of_another_run(pretrained, splits):
    with pytest.raises(ValueError, match=r"another recipe \(pretraining\.steps: 5 here, 4 there\)"):
        run_pretrain(
            recipe_of(pretraining={**SMALL["pretraining"], "steps": 5}), pretrained.path, splits
        )
    with pytest.raises(ValueError, match=r"was trained on other images"):
        pretrain(recipe_of(), pretrained.path, data=splits["test"], validation=splits["val"])


def test_a_loss_that_is_not_finite(splits, tmp_path):
    recipe = recipe_of(
        pretraining={**SMALL["pretraining"], "learning_rate": 1e30}, validation={"episodes": 0}
    )
    with pytest.raises(NonFiniteLossError, match=r"loss: nan at batch \d; lower the learning rate"):
        pretrain(recipe, tmp_path / "run", data=splits["train"], description=None)


def test_two_processes_do_not_train_in_one_folder(splits, tmp_path):
    run = tmp_path / "pre"
    with only_writer(run), pytest.raises(StoreLockedError, match=r"^run: .* is being written by"):
        run_pretrain(recipe_of(), run, splits)
    assert [file.name for file in run.iterdir()] == ["writer.lock"]
