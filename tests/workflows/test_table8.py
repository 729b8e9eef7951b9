import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_data
from small_recipes import write_recipes

from emd_retrieval.records import ResultRecord
from emd_retrieval.training import (
    build_model,
    embed_collection,
    load_model,
    load_recipe,
    load_recipe_data,
)
from emd_retrieval.training.model import load_state
from emd_retrieval.workflows import Machine, Table8, run_table8, table8, train
from emd_retrieval.workflows.cell_scores import Cell
from emd_retrieval.workflows.table8 import CONTROLS

LOSSES = ("normalized_softmax", "contrastive")


def make(folder, recipes, cub, trunk_features, **changes):
    return Table8(
        **{
            "recipes": recipes,
            "runs": folder / "runs",
            "data": cub,
            "methods": ("raw", "fcn"),
            "seeds": 1,
            "machine": Machine(cache=trunk_features),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory, cub, trunk_features):
    """Raw and FCN of two losses in one seed, with every control of FCN."""
    folder = tmp_path_factory.mktemp("table8")
    settings = make(
        folder, write_recipes(folder / "recipes"), cub, trunk_features, controls=tuple(CONTROLS)
    )
    record, failures = run_table8(settings, folder / "out")
    assert failures == {}
    return settings, record, folder


def scores_of(folder, cell):
    return pd.read_parquet(folder / "runs" / cell / "scores.parquet")


def test_every_cell_is_a_run_with_its_scores(table):
    _, record, folder = table
    variants = ["raw", "fcn", *(f"fcn-{control}" for control in CONTROLS)]
    for loss in LOSSES:
        for variant in variants:
            run = folder / "runs" / loss / variant / "seed0"
            assert (run / "scores.parquet").is_file()
            trained = variant != "fcn-evaluation"
            assert (run / "model.safetensors").is_file() is trained
    cells = record.table
    assert len(cells) == 2 * len(variants) * 3
    raw = cells[(cells["loss"] == "contrastive") & (cells["method"] == "raw")]
    expected = scores_of(folder, "contrastive/raw/seed0").mean()
    assert dict(zip(raw["metric"], raw["value"], strict=True)) == pytest.approx(
        expected.to_dict(), abs=1e-4
    )


def test_the_table_is_written(table):
    _, record, folder = table
    files = {file.name for file in (folder / "out").iterdir()}
    assert files >= {
        "table8.md", "table8.csv", "table8.json", "table8.tex", "table8.png",
        "table8_mean_gains.csv", "table8_controls.csv", "table8_runs.csv",
    }  # fmt: skip
    text = (folder / "out" / "table8.md").read_text(encoding="utf-8")
    assert "| N. Softmax" in text
    assert "63.40 (+1.57)" in text, "the paper's numbers stand beside ours"
    assert "| equal weights" in text
    assert r"\multirow{2}{*}{N. Softmax} & Raw &" in (folder / "out" / "table8.tex").read_text()
    loaded = ResultRecord.load(folder / "out" / "table8.json")
    assert loaded.data["test"]["classes"] == "6-8"
    assert loaded.settings["seeds"] == 1
    runs = record.tables["runs"].set_index(["loss", "cell"])
    assert float(runs.loc[("contrastive", "fcn"), "validation"]) > 0


def test_the_gain_is_paired_with_raw_of_the_same_loss(table):
    _, record, folder = table
    cells = record.table[record.table["control"] == ""].set_index(["loss", "method", "metric"])
    for loss in LOSSES:
        gain = (
            scores_of(folder, f"{loss}/fcn/seed0") - scores_of(folder, f"{loss}/raw/seed0")
        ).mean()
        for metric in ("P@1", "RP", "MAP@R"):
            assert cells.loc[(loss, "fcn", metric), "gain"] == pytest.approx(gain[metric], abs=1e-4)


@pytest.mark.parametrize(
    ("control", "setting", "value"),
    [
        ("mean", "similarity", "mean"),
        ("uniform", "weights", "uniform"),
        ("dense", "coupling", "dense"),
        ("detached", "weight_gradient", False),
    ],
)
def test_a_control_is_trained_otherwise(control, setting, value, table):
    _, _, folder = table
    recipe = load_model(folder / "runs" / "contrastive" / f"fcn-{control}" / "seed0").recipe
    method = load_model(folder / "runs" / "contrastive" / "fcn" / "seed0").recipe
    assert list(recipe.differences(method).values()) == [
        (value, {"similarity": "emd", "weights": "cross_reference", "coupling": "transport",
                 "weight_gradient": True}[setting])
    ]  # fmt: skip


def test_emd_at_evaluation_only_is_the_raw_model_compared_by_sets(table, cub, tmp_path):
    settings, _, folder = table
    recipe = load_recipe(settings.recipes / "contrastive.yaml", method="fcn")
    model = build_model(recipe)
    load_state(model, folder / "runs" / "contrastive" / "raw" / "seed0" / "model.safetensors")
    _, test = load_recipe_data(recipe.data, cub)
    scores = model.evaluate(embed_collection(model, test, cache=settings.machine.cache))
    found = scores_of(folder, "contrastive/fcn-evaluation/seed0")
    np.testing.assert_allclose(found.to_numpy(), scores.per_query.to_numpy(), rtol=1e-6)


def test_cells_that_are_there_are_read_and_missing_ones_run(table, monkeypatch):
    settings, record, _ = table
    ran = []

    def fit(recipe, run, *others):
        ran.append(run)
        return train.fit(recipe, run, *others)

    monkeypatch.setattr(table8, "fit", fit)
    again, failures = run_table8(settings)
    assert failures == {}
    assert ran == []
    pd.testing.assert_frame_equal(again.table, record.table)
    more = replace(settings, seeds=2, controls=(), losses=("contrastive",))
    wider, failures = run_table8(more)
    assert failures == {}
    assert [run.relative_to(settings.runs).as_posix() for run in ran] == [
        "contrastive/raw/seed1", "contrastive/fcn/seed1",
    ]  # fmt: skip
    assert set(wider.table["seeds"]) == {2}
    assert wider.table["spread"].notna().all()


def test_a_cell_that_fails_loses_no_other(tmp_path, recipes, cub, trunk_features, monkeypatch):
    def break_one(recipe, run, *others):
        if run.parts[-3:-1] == ("contrastive", "fcn"):
            raise RuntimeError("the disk\nis full")
        return train.fit(recipe, run, *others)

    settings = make(tmp_path, recipes, cub, trunk_features)
    with monkeypatch.context() as patch:
        patch.setattr(table8, "fit", break_one)
        record, failures = run_table8(settings, tmp_path / "out")
    failed = Cell(loss="contrastive", method="fcn")
    assert failures == {failed: "the disk is full"}
    assert "Failed: contrastive/fcn/seed0: the disk is full" in record.notes
    assert len(record.table) == 3 * 3
    told = (tmp_path / "runs" / str(failed) / "failure.txt").read_text()
    assert "break_one" in told
    record, failures = run_table8(settings)
    assert failures == {}
    assert len(record.table) == 4 * 3
    assert not (tmp_path / "runs" / str(failed) / "failure.txt").exists()


def test_a_changed_recipe_is_told_and_not_mixed_in(table):
    settings, _, _ = table
    overrides = ("optimization.learning_rate=0.5",)
    changed = replace(settings, controls=(), overrides=overrides, losses=("contrastive",))
    with pytest.raises(RuntimeError, match=r"all 2 cells failed.* holds a run of another recipe"):
        run_table8(changed)


def test_emd_at_evaluation_takes_no_raw_model_of_another_recipe(table):
    settings, _, folder = table
    runs = folder / "other_runs"
    shutil.copytree(settings.runs / "contrastive/raw", runs / "contrastive/raw")
    changed = replace(
        settings, runs=runs, controls=("evaluation",), losses=("contrastive",),
        overrides=("optimization.learning_rate=0.5",),
    )  # fmt: skip
    _, failures = run_table8(changed)
    assert {str(cell) for cell in failures} == {
        "contrastive/raw/seed0", "contrastive/fcn-evaluation/seed0",
    }  # fmt: skip
    assert all("holds a run of another recipe" in why for why in failures.values())


def test_scores_on_other_images_are_told_and_not_mixed_in(table):
    settings, _, folder = table
    runs = folder / "stale_runs"
    shutil.copytree(settings.runs / "contrastive/raw", runs / "contrastive/raw")
    file = runs / "contrastive/raw/seed0/scores.parquet"
    pd.read_parquet(file).rename(index=lambda name: f"other/{name}").to_parquet(file)
    stale = replace(settings, runs=runs, controls=(), losses=("contrastive",), methods=("raw",))
    with pytest.raises(RuntimeError, match="was scored on other images than"):
        run_table8(stale)


def test_a_failed_seed_leaves_no_gain_and_is_told(
    tmp_path, recipes, cub, trunk_features, monkeypatch
):
    def break_one(recipe, run, *others):
        if run.parts[-2:] == ("fcn", "seed1"):
            raise RuntimeError("the disk is full")
        return train.fit(recipe, run, *others)

    settings = make(tmp_path, recipes, cub, trunk_features, losses=("contrastive",), seeds=2)
    monkeypatch.setattr(table8, "fit", break_one)
    record, failures = run_table8(settings, tmp_path / "out")
    assert len(failures) == 1
    fcn = record.table[record.table["method"] == "fcn"]
    assert (fcn["seeds"] == 1).all()
    assert fcn["gain"].isna().all()
    assert any(note.startswith("contrastive/fcn lacks seeds (1 of 2)") for note in record.notes)


def test_cells_of_other_weights_are_not_mixed_in(tmp_path, recipes, cub):
    def settings(file, **changes):
        machine = Machine(cache=tmp_path / "trunk", weights=file)
        return make(
            tmp_path, recipes, cub, None, losses=("contrastive",), machine=machine, **changes
        )

    one, other = (
        small_data.write_weights(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)
    )
    assert run_table8(settings(one, methods=("raw",)))[1] == {}
    with pytest.raises(RuntimeError, match=r"all 1 cells failed.* other weights of test_resnet"):
        run_table8(settings(other, methods=("raw",)))
    _, failures = run_table8(settings(other, controls=("evaluation",)))
    assert {str(cell): "other weights" in why for cell, why in failures.items()} == {
        "contrastive/raw/seed0": True, "contrastive/fcn-evaluation/seed0": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ("seed=5",)}, r"overrides: got 'seed=5', but a table runs the seeds 0 to"),
        ({"machine": Machine(devices=2)}, "devices: a table trains each cell on one device, got 2"),
        ({"losses": ("arcfase",)}, "losses: expected one of normalized_softmax, contrastive; got"),
        ({"methods": ("gird",)}, r"methods: .* \(did you mean 'grid'\?\)"),
        ({"methods": ()}, "methods: expected at least one, got none"),
        ({"controls": ("men",)}, r"controls: .* \(did you mean 'mean'\?\)"),
        ({"seeds": 0}, "seeds: expected a positive number, got 0"),
        ({"overrides": ("model.patchs=3",)}, r"recipe .*: model\.patchs: no such setting"),
    ],
)
def test_bad_input_is_found_before_any_cell(
    changes, message, tmp_path, recipes, cub, trunk_features, monkeypatch
):
    monkeypatch.setattr("emd_retrieval.workflows.table8.fit", None)
    with pytest.raises(ValueError, match=f"^{message}"):
        run_table8(make(tmp_path, recipes, cub, trunk_features, **changes))
    assert not (tmp_path / "runs").exists()


def test_recipes_of_other_data(tmp_path, recipes, cub, trunk_features):
    own = "base: base.yaml\nloss: {name: contrastive}\ndata: {classes_test: 7-8}\n"
    (recipes / "contrastive.yaml").write_text(own)
    with pytest.raises(
        ValueError, match=r"^recipes: contrastive/raw/seed0 and normalized_softmax/"
    ):
        run_table8(make(tmp_path, recipes, cub, trunk_features))
