import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_data
import torch
from PIL import Image
from support import structured_sets

from emd_retrieval.datasets import UnreadableImageError
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.records import ResultRecord
from emd_retrieval.workflows import (
    EvaluateImages,
    EvaluateRanking,
    EvaluateSets,
    evaluate_images,
    evaluate_ranking,
    evaluate_stored_sets,
)

METRICS = ["P@1", "RP", "MAP@R"]


def image_settings(data, weights, **changes):
    settings = {
        "backbone": small_data.BACKBONE, "weights": weights, "resize": 48, "crop": 48,
        "pyramid": (2, 1), "shortlist": None,
    }  # fmt: skip
    return EvaluateImages(data=data, **{**settings, **changes})


@pytest.fixture
def broken_folder(image_folder, tmp_path):
    """A copy whose picture robin/01.png ends in the middle: its header is as it was."""
    folder = shutil.copytree(image_folder, tmp_path / "broken")
    file = folder / "robin" / "01.png"
    file.write_bytes(file.read_bytes()[:1500])
    return folder


def test_images(image_folder, weights, tmp_path):
    settings = image_settings(image_folder, weights, shortlist=8, seed=5)
    record, evaluation = evaluate_images(settings, tmp_path / "out")
    assert list(evaluation.scores) == ["Raw", "DeepEMD-FCN"]
    assert evaluation.scores["DeepEMD-FCN"].mean["P@1"] > 60, "stripes are easy to tell"
    assert set(record.tables) == {"metrics", "shortlist"}
    assert record.data["images"] == 12
    assert record.seed == 5
    settings = record.settings
    assert settings["backbone"] == small_data.BACKBONE
    assert settings["weights"] == "net.safetensors"
    assert settings["pyramid"] == [2, 1]
    assert settings["shortlist"] == 8
    assert settings["solver"] == "simplex"
    json.loads(record.to_json())

    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"evaluate.csv", "evaluate_shortlist.csv", "evaluate.md", "evaluate.json",
                     "gallery.png", "matches.png", "shortlist.png"}  # fmt: skip
    loaded = ResultRecord.load(tmp_path / "out" / "evaluate.json")
    assert loaded.figures == record.figures
    assert set(loaded.figures) == {"gallery.png", "matches.png", "shortlist.png"}
    text = (tmp_path / "out" / "evaluate.md").read_text(encoding="utf-8")
    for figure in loaded.figures:
        assert f"({figure})" in text
    table = pd.read_csv(tmp_path / "out" / "evaluate.csv")
    assert table["value"].tolist() == pytest.approx(record.table["value"].tolist())


@pytest.mark.parametrize("name", ["grid", "sampling"])
def test_patches(name, image_folder, weights, tmp_path):
    settings = image_settings(
        image_folder, weights, extractor=name, grid=(2,), patches=4, patch_size=32, context=1.5
    )
    record, evaluation = evaluate_images(settings, tmp_path)
    assert list(evaluation.scores) == ["Raw", f"DeepEMD-{name.title()}"]
    assert evaluation.scores["Raw"].mean["P@1"] > 60, "stripes are easy to tell"
    assert set(record.figures) == {"gallery.png", "matches.png", "shortlist.png"}
    assert record.settings["patch_size"] == 32
    assert any(note.startswith("Raw is the mean of the patch") for note in record.notes)
    again, _ = evaluate_images(settings)
    assert again.table.equals(record.table), "patches are drawn alike"
    _, other = evaluate_images(replace(settings, seed=1))
    same = torch.equal(evaluation.rankings["Raw"].scores, other.rankings["Raw"].scores)
    assert same is (name == "grid"), "Sampling's patches are the seed's"


def test_nothing_is_written_unasked(image_folder, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record, _ = evaluate_images(image_settings(image_folder, weights))
    assert list(tmp_path.iterdir()) == []
    assert record.figures == ()


def test_the_same_seed_gives_the_same_table(image_folder, weights):
    first, again = (
        evaluate_images(image_settings(image_folder, weights, seed=3))[0].table for _ in range(2)
    )
    assert first.equals(again)


def test_settings_reach_the_work(image_folder, weights):
    """Each setting on its own changes what is computed, or is said in the record."""
    _, base = evaluate_images(image_settings(image_folder, weights))

    def differs(**changes):
        _, other = evaluate_images(image_settings(image_folder, weights, **changes))
        return not torch.equal(
            base.rankings["DeepEMD-FCN"].scores, other.rankings["DeepEMD-FCN"].scores
        )

    assert not differs()
    assert differs(pyramid=(3,))
    assert differs(include_map=True)
    assert differs(layer=-2)
    assert differs(crop=40)
    assert differs(resize=56)
    assert differs(matcher=EMDMatcher(weights="uniform"))
    assert differs(bf16=True)
    _, part = evaluate_images(image_settings(image_folder, weights, classes="1,3"))
    assert len(part.rankings["Raw"]) == 8


def test_a_gallery_in_another_folder(image_folder, weights, tmp_path):
    """Classes meet by name: numbers differ, since the gallery has classes of its own."""
    gallery = small_data.write_images(tmp_path / "gallery", 3, ("auk", "robin", "tit", "owl"))
    shutil.rmtree(gallery / "robin")
    shutil.copytree(image_folder / "robin", gallery / "robin")
    settings = image_settings(image_folder, weights, gallery=gallery, shortlist=4)
    record, evaluation = evaluate_images(settings, tmp_path / "out")
    scores = evaluation.scores["DeepEMD-FCN"]
    assert scores.left_out == 4, "wrens are not in the gallery"
    assert "4 queries have no other image of their class" in " ".join(record.notes)
    robins = slice(0, 4)
    assert scores.per_query["P@1"].to_numpy()[robins].tolist() == [100] * 4, "found themselves"
    assert record.data["gallery"]["images"] == 13
    assert (tmp_path / "out" / "gallery.png").is_file()


def test_damaged_images_are_named(broken_folder, weights):
    for workers in (0, 1):
        settings = image_settings(broken_folder, weights, num_workers=workers)
        with pytest.raises(UnreadableImageError) as caught:
            evaluate_images(settings)
        message = str(caught.value)
        assert message.startswith(str(broken_folder / "robin" / "01.png"))
        assert "\n" not in message
        assert message.endswith(
            ". Restore or remove the image, or set skip_errors (--skip-errors) to go on without "
            "unreadable ones"
        )


def test_damaged_images_are_left_out_on_request(broken_folder, weights):
    settings = image_settings(broken_folder, weights, skip_errors=True)
    with pytest.warns(UserWarning, match=r"left out robin/01\.png: "):
        record, evaluation = evaluate_images(settings)
    assert len(evaluation.rankings["Raw"]) == 11
    assert record.data["images"] == 11
    assert "1 images could not be read and are left out." in record.notes


def refuse_to_work(*arguments, **options):
    raise AssertionError("the work began before the input was looked at")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shortlist": 2}, ValueError, "shortlist: 2 is smaller than the largest R, 3"),
        ({"shortlist": 0}, ValueError, "shortlist: expected a positive number, got 0"),
        ({"classes": "4"}, ValueError, "classes: class is not here: 4; birds has classes 1-3"),
        (
            {"backbone": "resnet_18"},
            ValueError,
            "backbone: expected a model of timm, got 'resnet_18'; nearest names:",
        ),
        ({"backbone": "resnet10t"}, ValueError, "does not fit 'resnet10t': "),
        ({"layer": 99}, ValueError, "layer: 'test_resnet' has feature maps 0 to "),
        ({"crop": 64}, ValueError, "crop: expected 1 to resize = 48 pixels, got 64"),
        ({"pyramid": (0,)}, ValueError, "pyramid: expected positive whole numbers"),
        ({"gallery": "nowhere"}, FileNotFoundError, "nowhere: no such folder"),
    ],
)
def test_bad_settings_are_found_before_the_work(
    changes, error, message, image_folder, weights, monkeypatch
):
    monkeypatch.setattr("emd_retrieval.workflows.evaluate.extract_features", refuse_to_work)
    if "gallery" in changes:
        changes = {"gallery": image_folder.parent / changes["gallery"]}
    with pytest.raises(error) as caught:
        evaluate_images(image_settings(image_folder, weights, **changes))
    assert message in str(caught.value)


def test_folders_that_cannot_be_evaluated(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("emd_retrieval.workflows.models.load_backbone", refuse_to_work)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        evaluate_images(image_settings(tmp_path / "nowhere", weights))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="empty: the folder is empty"):
        evaluate_images(image_settings(empty, weights))
    lone = small_data.write_images(tmp_path / "lone", 1)
    with pytest.raises(ValueError, match=r"^data: lone has one image per class, so no query has"):
        evaluate_images(image_settings(lone, weights))
    other = small_data.write_images(tmp_path / "other", 2, ("owl", "auk"))
    with pytest.raises(ValueError, match=r"^data: lone shares no class with the gallery"):
        evaluate_images(image_settings(lone, weights, gallery=other))
    Image.new("RGB", (8, 8)).save(lone / "robin" / "ok.png")
    (lone / "wren" / "text.png").write_text("no picture")
    with pytest.raises(UnreadableImageError, match=r"1 of 5 images of lone .* wren/text\.png"):
        evaluate_images(image_settings(lone, weights))


def test_an_output_that_cannot_be_is_found_before_the_work(image_folder, weights, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for output in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=r"output: expected a folder, got .* file"):
            evaluate_images(image_settings(image_folder, tmp_path / "no weights"), output)
        with pytest.raises(NotADirectoryError, match="output: expected a folder"):
            evaluate_stored_sets(EvaluateSets(embeddings=tmp_path / "none.npy"), output)
        with pytest.raises(NotADirectoryError, match="output: expected a folder"):
            evaluate_ranking(EvaluateRanking(ranking=file, labels=file), output)


@pytest.fixture
def stored(tmp_path, generator):
    """Packed sets of 4 classes with their labels, as files."""
    labels = torch.arange(20) % 4
    prototypes = structured_sets(4, 5, 8, generator)
    sets = prototypes[labels] + 0.7 * torch.randn(20, 5, 8, generator=generator)
    np.save(tmp_path / "sets.npy", sets.flatten(1).numpy())
    np.save(tmp_path / "labels.npy", np.array(["abcd"[label] for label in labels]))
    return tmp_path


def test_stored_sets(stored):
    settings = EvaluateSets(
        embeddings=stored / "sets.npy", labels=stored / "labels.npy", channels=8, shortlist=10
    )
    record, evaluation = evaluate_stored_sets(settings, stored / "out")
    assert list(evaluation.scores) == ["Raw", "DeepEMD"]
    assert record.settings["nodes"] == 5
    assert record.settings["channels"] == 8
    assert record.settings["shortlist"] == 10
    assert record.data == {"embeddings": "sets.npy", "images": 20, "classes": 4}
    loaded = ResultRecord.load(stored / "out" / "evaluate.json")
    assert loaded.figures == ("shortlist.png",)
    assert (stored / "out" / "shortlist.png").is_file()


def test_stored_sets_with_a_gallery(stored):
    sets = np.load(stored / "sets.npy")
    np.save(stored / "query.npy", sets[:8])
    np.save(stored / "query_labels.npy", np.load(stored / "labels.npy")[:8])
    gallery = pd.DataFrame(
        {"embedding": list(sets[8:]), "label": np.load(stored / "labels.npy")[8:]}
    )
    gallery.to_parquet(stored / "gallery.parquet")
    settings = EvaluateSets(
        embeddings=stored / "query.npy",
        labels=stored / "query_labels.npy",
        gallery_embeddings=stored / "gallery.parquet",
        channels=8,
        shortlist=None,
        global_node=0,
    )
    record, evaluation = evaluate_stored_sets(settings)
    assert record.data["gallery_images"] == 12
    assert record.settings["global_node"] == 0
    both = [torch.from_numpy(part).view(-1, 5, 8) for part in (sets[:8], sets[8:])]
    similarity = EMDMatcher().all_pairs(*both)
    assert torch.equal(evaluation.rankings["DeepEMD"].rows[:, 0], similarity.argmax(dim=1))
    np.save(stored / "gallery.npy", sets[8:])
    unlabelled = replace(settings, gallery_embeddings=stored / "gallery.npy")
    with pytest.raises(ValueError, match=r"^gallery_labels: gallery\.npy has no column 'label'"):
        evaluate_stored_sets(unlabelled)


def test_plain_vectors_are_scored_by_cosine(stored, monkeypatch):
    monkeypatch.setattr("emd_retrieval.workflows.evaluate.evaluate_sets", refuse_to_work)
    settings = EvaluateSets(embeddings=stored / "sets.npy", labels=stored / "labels.npy")
    record, evaluation = evaluate_stored_sets(settings, stored / "out")
    assert list(evaluation.scores) == ["Raw"]
    assert record.title == "Cosine retrieval of plain vectors"
    assert record.figures == ()
    assert "solver" not in record.settings, "nothing was matched"
    assert not (stored / "out" / "shortlist.png").exists()


def test_labels_for_a_gallery_that_is_not_there(stored):
    settings = EvaluateSets(
        embeddings=stored / "sets.npy",
        labels=stored / "labels.npy",
        gallery_labels=stored / "labels.npy",
    )
    with pytest.raises(ValueError, match=r"^gallery_labels: there is no gallery"):
        evaluate_stored_sets(settings)


@pytest.fixture
def ranking(tmp_path):
    """Two rankings of eight images in two classes, a perfect one and its reverse."""
    rows = [(q, i, int(q % 2 != i % 2)) for q in range(8) for i in range(8) if i != q]
    table = pd.DataFrame(rows, columns=["query", "id", "other"])
    perfect = table.sort_values(["query", "other"], kind="stable")
    perfect[["query", "id"]].to_csv(tmp_path / "perfect.csv", index=False)
    reverse = table.sort_values(["query", "other"], ascending=[True, False], kind="stable")
    reverse[["query", "id"]].to_csv(tmp_path / "reverse.csv", index=False)
    labels = pd.DataFrame({"id": range(8), "label": ["even", "odd"] * 4})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def test_ranking(ranking):
    settings = EvaluateRanking(
        ranking=ranking / "perfect.csv",
        labels=ranking / "labels.csv",
        baseline=ranking / "reverse.csv",
    )
    record, evaluation = evaluate_ranking(settings, ranking / "out")
    assert evaluation.scores["ranking"].mean == dict.fromkeys(METRICS, 100)
    assert evaluation.scores["baseline"].mean == dict.fromkeys(METRICS, 0)
    table = record.table.set_index(["method", "metric"])
    assert table.loc[("ranking", "MAP@R"), "gain"] == 100
    assert record.settings == {
        "ranking": "perfect.csv", "labels": "labels.csv", "baseline": "reverse.csv",
    }  # fmt: skip
    files = sorted(file.name for file in (ranking / "out").iterdir())
    assert files == ["evaluate.csv", "evaluate.json", "evaluate.md"]


def test_a_baseline_of_other_queries(ranking):
    table = pd.read_csv(ranking / "reverse.csv")
    table[table["query"] < 7].to_csv(ranking / "part.csv", index=False)
    settings = EvaluateRanking(
        ranking=ranking / "perfect.csv",
        labels=ranking / "labels.csv",
        baseline=ranking / "part.csv",
    )
    with pytest.raises(ValueError) as caught:
        evaluate_ranking(settings)
    assert str(caught.value) == (
        "baseline: part.csv answers 7 queries, perfect.csv 8; both must answer the same ones"
    )


def test_rankings_and_stored_sets_agree(stored):
    """What one workflow ranks, scored by the other from a file, has the same scores."""
    sets = EvaluateSets(
        embeddings=stored / "sets.npy", labels=stored / "labels.npy", channels=8, shortlist=None
    )
    _, evaluation = evaluate_stored_sets(sets)
    tables = {}
    for name, ranks in evaluation.rankings.items():
        rows = ranks.rows
        tables[name] = stored / f"{name}.parquet"
        pd.DataFrame(
            {
                "query": torch.arange(20).repeat_interleave(rows.shape[1]).numpy(),
                "id": rows.flatten().numpy(),
                "score": ranks.scores.flatten().numpy(),
            }
        ).sample(frac=1, random_state=0).to_parquet(tables[name])
    labels = pd.DataFrame({"id": np.arange(20), "label": np.load(stored / "labels.npy")})
    labels.sample(frac=1, random_state=1).to_csv(stored / "labels.csv", index=False)
    settings = EvaluateRanking(
        ranking=tables["DeepEMD"], labels=stored / "labels.csv", baseline=tables["Raw"]
    )
    _, other = evaluate_ranking(settings)
    assert other.scores["ranking"].mean == pytest.approx(evaluation.scores["DeepEMD"].mean)
    assert other.scores["baseline"].mean == pytest.approx(evaluation.scores["Raw"].mean)
