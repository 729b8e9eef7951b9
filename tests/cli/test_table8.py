import json
import warnings

import pytest

from emd_retrieval.cli import main
from emd_retrieval.workflows import table8, train


@pytest.fixture(autouse=True)
def _leave_warnings_as_they_were(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def command(recipes, cub, trunk_features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [
        "table8", "optimization.steps=2", "--recipes", str(recipes), "--data", str(cub),
        "--cache", str(trunk_features), "--output", "results/small", "--workers", "0",
        "--device", "cpu", "--methods", "raw,fcn", "--losses", "contrastive", "--seeds", "1",
    ]  # fmt: skip


def test_the_table(command, tmp_path, capsys):
    assert main([*command, "--controls", "mean"]) == 0
    printed = capsys.readouterr()
    assert "Table 8 on CUB-200-2011 (recipes)" in printed.out
    assert "+DeepEMD-F" in printed.out
    assert "mean of the nodes, cosine" in printed.out
    assert printed.err == ""
    record = json.loads((tmp_path / "results/small/table8.json").read_text(encoding="utf-8"))
    assert record["settings"]["overrides"] == ["optimization.steps=2"]
    run = tmp_path / "runs" / "small" / "contrastive" / "fcn-mean" / "seed0"
    assert (run / "model.safetensors").is_file(), "cells lie in runs/, by the output's name"


def test_a_failed_cell_is_told_after_the_table(command, capsys, monkeypatch):
    def break_one(recipe, run, *others):
        if recipe.model.method == "fcn":
            raise RuntimeError("the disk is full")
        return train.fit(recipe, run, *others)

    monkeypatch.setattr(table8, "fit", break_one)
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "| Contrastive | Raw" in printed.out
    assert "- Failed: contrastive/fcn/seed0: the disk is full" in printed.out
    assert printed.err.splitlines()[-1] == (
        "emd-retrieval: error: 1 cells failed and are not in the table, the first, "
        "contrastive/fcn/seed0: the disk is full"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--losses", "tripel"], "losses: expected one of normalized_softmax, contrastive; got"),
        (["--methods", "raw,fnc"], "methods: expected one of raw, fcn, grid, sampling; got 'fnc'"),
        (["--controls", "men"], "controls: expected one of mean, uniform, dense, detached, eval"),
        (["--seeds", "0"], "seeds: expected a positive number, got 0"),
        (["--recipes", "nowhere"], "recipes: no folder 'nowhere'"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input(options, message, command, capsys):
    assert main([*command, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"emd-retrieval: error: {message}"), printed.err
