import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from emd_retrieval.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _leave_warnings_as_they_were(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def command(recipes, cub, trunk_features, tmp_path):
    def make(*overrides, recipe="contrastive"):
        return [
            "train", str(recipes / f"{recipe}.yaml"), *overrides, "--data", str(cub),
            "--cache", str(trunk_features), "--run", str(tmp_path / "run"), "--workers", "0",
            "--device", "cpu",
        ]  # fmt: skip

    return make


def one_line(capsys):
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    return lines[0].removeprefix("emd-retrieval: error: ")


def test_train_and_evaluate_the_run(command, cub, tmp_path, capsys):
    assert main([*command("optimization.steps=2"), "--method", "grid", "--seed", "5"]) == 0
    printed = capsys.readouterr()
    assert "DeepEMD-G trained with Contrastive on CUB-200-2011" in printed.out
    assert "- 2 steps in " in printed.out
    assert printed.err == "", "no chatter of Lightning's"
    record = json.loads((tmp_path / "run" / "train.json").read_text(encoding="utf-8"))
    assert record["seed"] == 5
    assert record["settings"]["model"]["method"] == "grid"
    evaluate = ["evaluate", "--data", str(cub), "--classes", "6-8", "--model",
                str(tmp_path / "run"), "--shortlist", "all", "--workers", "0", "--output",
                str(tmp_path / "out")]  # fmt: skip
    assert main(evaluate) == 0
    assert "Raw against DeepEMD-Grid" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "evaluate.json").read_text(encoding="utf-8"))
    assert record["settings"]["model"] == "run"
    assert record["settings"]["resize"] == 36
    assert main([*evaluate, "--crop", "30"]) == 2
    assert one_line(capsys).startswith("--crop does not go with --model, whose recipe")


def test_validate_only(command, capsys):
    assert main([*command("optimization.steps=2"), "--validate-only"]) == 0
    printed = capsys.readouterr().out
    assert "| step |" in printed
    assert "Query and gallery" not in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.name=arcfase"], "(did you mean 'arcface'?)"),
        (["modl.method=fcn"], "modl: no such setting; did you mean 'model'?"),
        (["model.method=fnc"], "method: expected one of raw, fcn, grid, sampling; got 'fnc'"),
        (["steps"], "override: expected 'section.key=value', got 'steps'"),
        (["data.classes_test=101-200"], "classes: classes are not here: 101-200"),
        (["model.weights=nothing.safetensors"], "weights: no file 'nothing.safetensors'"),
    ],
)
def test_bad_settings(overrides, message, command, capsys):
    assert main(command(*overrides)) == 2
    assert message in one_line(capsys)


def test_absent_data_and_recipes(command, capsys, tmp_path):
    arguments = command()
    arguments[arguments.index("--data") + 1] = str(tmp_path / "nowhere")
    assert main(arguments) == 2
    told = one_line(capsys)
    assert "nowhere: no such folder" in told
    assert "Caltech" in told
    assert main(command(recipe="nothing")) == 2
    assert one_line(capsys).startswith("recipe: no file ")


@pytest.mark.slow
def test_two_processes_train_and_one_writes(command, tmp_path):
    arguments = [*command("validation.folds=0"), "--devices", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "emd_retrieval.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained with Contrastive") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "scores.parquet").is_file()


def test_a_run_of_another_recipe(command, capsys):
    assert main(command("optimization.steps=2")) == 0
    capsys.readouterr()
    assert main(command("optimization.steps=3")) == 2
    assert "holds a run of another recipe (optimization.steps: 3 here, 2 there)" in one_line(capsys)


def test_examples_of_the_help_are_commands_that_parse():
    from emd_retrieval.cli.main import build_parser
    from emd_retrieval.cli.table8 import EXAMPLES as TABLE8
    from emd_retrieval.cli.train import EXAMPLES as TRAIN

    text = (TRAIN + TABLE8).replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if "emd-retrieval " in line]
    assert len(commands) == 7
    for command in commands:
        assert command[0] == "emd-retrieval"
        options = build_parser().parse_args(command[1:])
        recipe = getattr(options, "recipe", None) or options.recipes
        assert (ROOT / recipe).exists()
