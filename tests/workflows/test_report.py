import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
import small_data
import torch

from emd_retrieval.cli import main
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.reports.explorer import ExplorerData
from emd_retrieval.workflows import EvaluateImages, evaluate_images, write_report


def settings(image_folder, weights, **changes):
    chosen = {
        "data": image_folder, "backbone": small_data.BACKBONE, "weights": weights, "resize": 48,
        "crop": 48, "pyramid": (2, 1), "shortlist": None, "report": 200, **changes,
    }  # fmt: skip
    return EvaluateImages(**chosen)


@pytest.fixture(scope="module")
def run(image_folder, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    _, evaluation = evaluate_images(settings(image_folder, weights), folder)
    return folder, evaluation


def test_a_run_keeps_what_it_ranked(run, image_folder):
    folder, evaluation = run
    explorer = ExplorerData.load(folder / "explorer.npz")
    before, after = evaluation.rankings.values()
    assert explorer.methods == ("Raw", "DeepEMD-FCN")
    assert (explorer.total, len(explorer.queries), len(explorer.pictures)) == (12, 12, 12)
    # In the folder's order, which is that of the rows: classes by name, four pictures each.
    row_of = {
        f"{name}/{i:02d}.png": 4 * number + i
        for number, name in enumerate(sorted(small_data.CLASSES))
        for i in range(4)
    }
    names = [picture.name for picture in explorer.pictures]
    assert set(names) == set(row_of)
    for query in explorer.queries:
        row = row_of[names[query.picture]]
        for method, ranking in enumerate((before, after)):
            rows = [row_of[names[place]] for place in query.neighbours[method]]
            assert rows == ranking.rows[row].tolist()
            np.testing.assert_array_equal(query.similarities[method], ranking.scores[row].numpy())
        for method, score in enumerate(evaluation.scores.values()):
            assert query.scores[method] == pytest.approx(score.per_query["MAP@R"][row], abs=1e-4)
    labels = [explorer.class_names[picture.label] for picture in explorer.pictures]
    assert labels == [name.split("/")[0] for name in names]


def test_matches_are_those_that_ranked(run):
    explorer = ExplorerData.load(run[0] / "explorer.npz")
    pairs = {(q.picture, int(p)) for q in explorer.queries for p in q.neighbours.ravel()}
    assert set(explorer.matches) == pairs
    for query in explorer.queries:
        for place, similarity in zip(query.neighbours[1], query.similarities[1], strict=True):
            match = explorer.matches[query.picture, int(place)]
            assert match.similarity == pytest.approx(similarity, abs=1e-5)
            total = match.flow.astype(np.float64)
            assert total.sum() == pytest.approx(1, abs=5e-3), (
                "float16, and next to nothing left out"
            )
            assert 1 - (total * match.cost).sum() == pytest.approx(match.similarity, abs=5e-3)
            assert len(match.flow) < len(match.query_weights) + len(match.reference_weights)
            supply = np.bincount(match.pairs[:, 0], match.flow, minlength=5)
            np.testing.assert_allclose(supply, match.query_weights, atol=2e-3)


def test_classes_are_means_over_all_queries(run, image_folder, weights, tmp_path):
    few = tmp_path / "few"
    evaluate_images(settings(image_folder, weights, report=2), few)
    explorer, whole = (ExplorerData.load(f / "explorer.npz") for f in (few, run[0]))
    assert len(explorer.queries) == 2
    assert explorer.total == 12
    assert explorer.classes == whole.classes
    scores = run[1].scores["DeepEMD-FCN"].per_query["MAP@R"].to_numpy().reshape(3, 4).mean(axis=1)
    assert [result.after for result in explorer.classes] == pytest.approx(scores.tolist())
    assert "2 of 12 queries" in (few / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_the_run(run):
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    assert "Raw against DeepEMD-FCN" in page
    assert "Shortlist trade-off" in page
    assert page.count("data:image/svg+xml;base64,") == 2, "one for screens, one for phones"
    assert write_report(run[0]).read_text(encoding="utf-8") == page, "made of the folder alone"


def test_a_gallery_apart(image_folder, weights, tmp_path):
    gallery = tmp_path / "gallery"
    shutil.copytree(image_folder, gallery)
    evaluate_images(settings(image_folder, weights, gallery=gallery), tmp_path / "run")
    explorer = ExplorerData.load(tmp_path / "run" / "explorer.npz")
    queries = {query.picture for query in explorer.queries}
    answers = {int(place) for query in explorer.queries for place in query.neighbours.ravel()}
    assert not queries & answers, "a gallery image is not the query image of the same number"
    for query in explorer.queries:
        first = explorer.matches[query.picture, int(query.neighbours[1, 0])]
        assert first.similarity == pytest.approx(1, abs=1e-5), "its own copy is found first"


def test_dense_flows_are_kept_and_clusters_have_no_place(image_folder, weights, tmp_path):
    matcher = EMDMatcher(weights="uniform", coupling="dense")
    evaluate_images(settings(image_folder, weights, matcher=matcher), tmp_path / "dense")
    dense = ExplorerData.load(tmp_path / "dense" / "explorer.npz")
    assert {len(match.flow) for match in dense.matches.values()} == {25}
    evaluate_images(settings(image_folder, weights, include_map=True), tmp_path / "map")
    explorer = ExplorerData.load(tmp_path / "map" / "explorer.npz")
    nodes = {len(match.query_weights) for match in explorer.matches.values()}
    assert nodes == {len(explorer.pictures[0].boxes)}, "cells of the map lie in the image"
    matcher = EMDMatcher(weights="k_means", clusters=2)
    evaluate_images(settings(image_folder, weights, matcher=matcher), tmp_path / "clusters")
    explorer = ExplorerData.load(tmp_path / "clusters" / "explorer.npz")
    assert explorer.matches == {}
    assert len(explorer.queries) == 12
    page = (tmp_path / "clusters" / "report.html").read_text(encoding="utf-8")
    assert "This run keeps no matches" in page


def test_random_patches_have_boxes_of_their_own(image_folder, weights, tmp_path):
    torch.manual_seed(0)
    patches = settings(image_folder, weights, extractor="sampling", patches=4, patch_size=32)
    evaluate_images(replace(patches, report=3), tmp_path)
    explorer = ExplorerData.load(tmp_path / "explorer.npz")
    boxes = [picture.boxes for picture in explorer.pictures]
    assert all(box.shape == (4, 4) for box in boxes)
    assert not np.array_equal(boxes[0], boxes[1])
    assert explorer.matches


def test_training_curves(tmp_path):
    with (tmp_path / "log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "MAP@R"])
        writer.writerows([[0, "", 40.0], [1, 0.9, ""], [2, 0.5, ""], [2, "", 55.0]])
    page = write_report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>Training</h2>" in page
    assert f"<title>{tmp_path.name}</title>" in page


def test_the_command(run, tmp_path, capsys):
    assert main(["report", str(run[0]), "--output", str(tmp_path / "page.html")]) == 0
    assert "page.html (" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_bytes() == (run[0] / "report.html").read_bytes()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "no result record" in capsys.readouterr().err


def test_a_number_of_queries_must_be_one(image_folder, weights, tmp_path):
    with pytest.raises(ValueError, match="report: expected a positive number, got 0"):
        evaluate_images(settings(image_folder, weights, report=0), tmp_path)


def test_pictures_are_limited(image_folder, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("emd_retrieval.workflows.explorer._MOST_BYTES", 1)
    evaluate_images(settings(image_folder, weights), tmp_path)
    assert len(ExplorerData.load(tmp_path / "explorer.npz").queries) == 1
