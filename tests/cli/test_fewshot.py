"""``emd-retrieval fewshot`` as a person types it."""

import pytest
import small_data

from emd_retrieval.cli.main import main

RECIPE = """
data: {name: folder}
model: {backbone: test_resnet}
views: {resize: 64, crop: 64}
pretraining: {steps: 2, batch_size: 6, learning_rate: 0.02}
meta_training: {way: 2, queries: 2, episodes: 2}
validation: {way: 2, queries: 2, episodes: 4}
test: {queries: 2, one_shot_episodes: 6, episodes: 4}
"""


@pytest.fixture
def recipe(tmp_path):
    for split, classes in (("train", ("a", "b", "c")), ("val", ("d", "e")), ("test", ("f", "g"))):
        small_data.write_images(tmp_path / "data" / split, per_class=4, classes=classes)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


def fewshot(tmp_path, name, *arguments):
    common = ("--data", str(tmp_path / "data"), "--device", "cpu", "--quiet", "--workers", "0")
    cache = ("--cache", str(tmp_path / "cache"))
    return main(["fewshot", name, str(tmp_path / "small.yaml"), *arguments, *common, *cache])


def test_the_whole_way(recipe, tmp_path, capsys):
    pre, fcn = str(tmp_path / "pre"), str(tmp_path / "fcn")
    assert fewshot(tmp_path, "pretrain", "--run", pre) == 0
    assert fewshot(tmp_path, "train", "--run", fcn, "--start", pre) == 0
    capsys.readouterr()
    assert fewshot(tmp_path, "test", "--run", fcn, "--way", "2", "--shot", "1,2") == 0
    printed = capsys.readouterr().out
    assert "meta-trained" in printed
    assert "nearest" in printed
    assert "sfc" in printed
    assert (tmp_path / "fcn" / "fewshot_test.json").is_file()


def test_a_table_and_the_figure(recipe, tmp_path, capsys):
    small_data.write_images(tmp_path / "data" / "test", per_class=4, classes=tuple("fghijklmno"))
    common = [
        str(recipe), "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"),
        "--cache", str(tmp_path / "cache"), "--device", "cpu", "--workers", "0", "--quiet",
        "--stage", "pretrain", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(["fewshot", "table", "1", *common, "--rows", "KNN; DeepEMD"]) == 0
    printed = capsys.readouterr().out
    assert "65.91" in printed, "the paper's number"
    assert "KNN" in printed
    assert main(["fewshot", "figure", "5", *common, "--shot", "1,2", "--rows", "SFC"]) == 0
    assert (tmp_path / "out" / "fewshot_figure5.png").is_file()
    assert main(["fewshot", "figure", "6", *common]) == 2
    assert "figure: expected 5, got 6" in capsys.readouterr().err


def test_bad_input(recipe, tmp_path, capsys):
    for arguments, message in [
        (("test", "--run", str(tmp_path / "none")), "is not there"),
        (("test", "--run", "x", "--way", "five"), "--way: expected whole numbers"),
        (("pretrain", "pretraining.steeps=2", "--run", "x"), "did you mean 'steps'"),
        (("train", "--run", "x", "--start", str(tmp_path)), "no run.json"),
    ]:
        assert fewshot(tmp_path, *arguments) == 2
        assert message in capsys.readouterr().err
