from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_data

from emd_retrieval.records import ResultRecord
from emd_retrieval.training import load_model
from emd_retrieval.workflows import (
    EvaluateImages,
    Machine,
    TrainRecipe,
    evaluate_images,
    train_recipe,
)


@pytest.fixture
def settings(recipes, cub, trunk_features, tmp_path):
    def make(**changes):
        return TrainRecipe(
            **{
                "recipe": recipes / "contrastive.yaml",
                "run": tmp_path / "run",
                "data": cub,
                "machine": Machine(cache=trunk_features),
                **changes,
            }
        )

    return make


def refuse(*arguments, **options):
    raise AssertionError("this must not be called")


@pytest.mark.parametrize("method", ["raw", "fcn"])
def test_a_run_is_trained_scored_and_written_down(method, settings, tmp_path):
    record, scores = train_recipe(settings(method=method))
    run = tmp_path / "run"
    files = {file.name for file in run.iterdir()}
    assert files >= {
        "model.safetensors", "recipe.yaml", "run.json", "log.csv", "scores.parquet", "train.md",
        "train.csv", "train.json", "training.png",
    }  # fmt: skip
    per_query = pd.read_parquet(run / "scores.parquet")
    assert len(per_query) == 12
    assert per_query.index[0] == "006.Bird_6/0.png"
    table = record.table.set_index("metric")
    assert per_query.mean().to_dict() == pytest.approx(table["value"].to_dict(), abs=1e-3)
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert record.settings["model"]["method"] == method
    assert record.data["train"]["classes"] == "1-5"
    assert record.data["test"]["classes"] == "6-8"
    assert ResultRecord.load(run / "train.json").figures == ("training.png",)
    model = load_model(run)
    assert model.recipe.model.method == method
    assert scores.mean == pytest.approx(table["value"].to_dict())


def test_a_run_killed_in_its_evaluation_is_not_trained_again(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("emd_retrieval.workflows.train.score", refuse)
        with pytest.raises(AssertionError, match="must not be called"):
            train_recipe(settings())
    trained = (tmp_path / "run" / "model.safetensors").stat()
    record, _ = train_recipe(settings())
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == trained.st_mtime_ns
    assert set(record.tables) == {"metrics", "validation"}


def test_validation_alone_leaves_the_test_classes_alone(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("emd_retrieval.workflows.train.score", refuse)
    record, scores = train_recipe(settings(validate_only=True))
    assert scores is None
    assert list(record.tables) == ["validation"]
    assert "test" not in record.data
    assert not (tmp_path / "run" / "scores.parquet").exists()
    with pytest.raises(ValueError, match=r"^validation\.folds: expected 2 or more with validate_"):
        train_recipe(settings(validate_only=True, overrides=["validation.folds=0"]))


def test_overrides_reach_the_run(settings):
    record, _ = train_recipe(settings(overrides=["optimization.steps=2", "seed=3"]))
    assert record.seed == 3
    assert record.settings["optimization"]["steps"] == 2


def test_bad_input(settings, tmp_path, monkeypatch, cub):
    monkeypatch.setattr("emd_retrieval.workflows.train.train", refuse)
    with pytest.raises(FileNotFoundError, match="Caltech"):
        train_recipe(settings(data=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^data\.root: the recipe names no folder of CUB"):
        train_recipe(settings(data=None))
    with pytest.raises(ValueError, match=r"^classes: classes are not here: 101-200"):
        train_recipe(settings(overrides=["data.classes_test=101-200"]))
    with pytest.raises(FileNotFoundError, match=r"no file 'nothing\.yaml'"):
        train_recipe(settings(recipe=Path("nothing.yaml")))
    with pytest.raises(ValueError, match=r"optimization\.lerning_rate: no such setting; did you m"):
        train_recipe(settings(overrides=["optimization.lerning_rate=1"]))


def test_a_damaged_picture_is_found_before_the_work(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("emd_retrieval.workflows.train.train", refuse)
    root = small_data.write_cub(tmp_path, range(1, 9))
    (root / "images" / "002.Bird_2" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 10 images .* 002\.Bird_2/0\.png"):
        train_recipe(settings(data=root))


def test_a_folder_of_another_recipe(settings):
    train_recipe(settings())
    with pytest.raises(ValueError) as caught:
        train_recipe(settings(overrides=["optimization.learning_rate=0.02"]))
    told = "another recipe (optimization.learning_rate: 0.02 here, 0.01 there)"
    assert told in str(caught.value)


def test_a_trained_run_stands_where_a_backbone_does(settings, cub, tmp_path):
    _, scores = train_recipe(settings(overrides=["matching.weights=uniform"]))
    record, evaluation = evaluate_images(
        EvaluateImages(data=cub, classes="6-8", model=tmp_path / "run", shortlist=None)
    )
    found = evaluation.scores["DeepEMD-FCN"].per_query.to_numpy()
    # Training keeps its features in half precision: a tie may fall otherwise.
    assert np.abs(found - scores.per_query.to_numpy()).mean() < 3
    assert record.settings["model"] == "run"
    assert record.settings["weights"] == "test_resnet"
    assert record.settings["embedding_size"] == 8
    assert (record.settings["crop"], record.settings["resize"]) == (32, 36)
    with pytest.raises(FileNotFoundError, match=r"^run: .*nowhere is not there"):
        evaluate_images(EvaluateImages(data=cub, model=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (Machine(), ("cpu", 1, 1)),
        (Machine(device="cuda:1"), ("cuda", [1], 1)),
        (Machine(device="cuda", devices=4, nodes=2), ("cuda", 4, 2)),
    ],
)
def test_training_takes_the_devices_that_are_asked_for(machine, expected, settings, monkeypatch):
    seen = []

    def train(*_, accelerator, devices, nodes, **__):
        seen.append((accelerator, devices, nodes))
        raise KeyboardInterrupt

    monkeypatch.setattr("emd_retrieval.workflows.train.train", train)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(settings(machine=machine))
    assert seen == [expected]


def test_one_device_by_number_is_not_several():
    with pytest.raises(ValueError, match="device: expected a kind of device, as 'cuda', for 2"):
        Machine(device="cuda:1", devices=2)
    with pytest.raises(ValueError, match="devices: expected a positive number, got 0"):
        Machine(devices=0)
