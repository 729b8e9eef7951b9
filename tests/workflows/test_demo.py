import json

import pytest

from emd_retrieval.workflows import Demo, run_demo

TINY = Demo(
    train_species=4,
    test_species=3,
    train_images=4,
    test_images=4,
    side=32,
    steps=2,
    classes_per_batch=2,
    images_per_class=2,
    embedding_size=8,
    pyramid=(2, 1),
)


def test_the_whole_demo_runs_and_writes_its_folder(tmp_path):
    said = []
    record, evaluation = run_demo(TINY, tmp_path, say=said.append)
    assert list(evaluation.rankings) == ["Raw", "DeepEMD-FCN"]
    assert {file.name for file in tmp_path.iterdir()} >= {
        "demo.csv",
        "demo.json",
        "demo.md",
        "gallery.png",
    }
    assert record.data["train"]["num_classes"] == 4
    assert record.data["test"]["num_classes"] == 3
    assert record.data["train"]["classes"] != record.data["test"]["classes"], "species held out"
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["settings"]["steps"] == 2
    assert len(said) == 4


def test_the_same_seed_gives_the_same_table():
    first, second = (run_demo(TINY)[0].table for _ in range(2))
    assert first.equals(second)


def test_refuses_settings_out_of_range():
    with pytest.raises(ValueError, match="steps: expected a positive number, got 0"):
        run_demo(Demo(train_species=4, test_species=3, train_images=2, test_images=2, steps=0))
