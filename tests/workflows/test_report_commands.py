"""Commands that write a page on request: demo, rerank, table8."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_data import BACKBONE
from small_recipes import write_recipes

from emd_retrieval.cli import main
from emd_retrieval.reports.explorer import ExplorerData
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.workflows import (
    Demo,
    ExtractImages,
    Machine,
    RerankQueries,
    Table8,
    extract_images,
    rerank_queries,
    run_demo,
    run_table8,
    write_charts,
    write_report,
)
from emd_retrieval.workflows.cell_explorer import choose_cells
from emd_retrieval.workflows.cell_scores import Cell

TINY = Demo(
    train_species=3, test_species=3, train_images=4, test_images=4, side=32, steps=2,
    classes_per_batch=2, images_per_class=2, embedding_size=8, pyramid=(2, 1),
)  # fmt: skip


def test_the_demo(tmp_path):
    run_demo(TINY, tmp_path, report=5)
    explorer = ExplorerData.load(tmp_path / "explorer.npz")
    assert len(explorer.queries) == 5
    assert explorer.total == 12
    assert {picture.size for picture in explorer.pictures} == {(32, 32)}
    assert "5 of 12 queries" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="report: expected a positive number, got 0"):
        run_demo(TINY, tmp_path, report=0)


@pytest.fixture(scope="module")
def image_store(tmp_path_factory, image_folder, weights):
    path = tmp_path_factory.mktemp("stores") / "birds.store"
    extract_images(
        ExtractImages(
            images=image_folder,
            store=path,
            backbone=BACKBONE,
            weights=weights,
            crop=48,
            resize=48,
            pyramid=(2, 1),
        )
    )
    return path


def settings(image_store, image_folder, weights, **changes):
    chosen = {"store": image_store, "queries": image_folder, "weights": weights, "k": 4,
              "shortlist": 6, "exclude_self": True, "report": 200, **changes}  # fmt: skip
    return RerankQueries(**chosen)


def test_rerank_keeps_answers_before_and_after(image_store, image_folder, weights, tmp_path):
    _, ranking = rerank_queries(
        settings(image_store, image_folder, weights, images=image_folder), tmp_path
    )
    explorer = ExplorerData.load(tmp_path / "explorer.npz")
    assert not explorer.labelled
    assert (explorer.methods, explorer.total) == (("first stage", "re-ranked by EMD"), 12)
    names = [picture.name for picture in explorer.pictures]
    answers = ranking.groupby("query", sort=False)
    assert len(explorer.queries) == 12
    for query in explorer.queries:
        asked = names[query.picture]
        wanted = answers.get_group(asked)
        assert [names[place] for place in query.neighbours[1]] == wanted["id"].tolist()
        assert query.similarities[1] == pytest.approx(wanted["similarity"].to_numpy(), abs=1e-6)
        assert asked not in [names[place] for place in query.neighbours[0]]
        assert np.all(np.diff(query.similarities[0]) <= 0), "the first stage's own order"
        for place, similarity in zip(query.neighbours[1], query.similarities[1], strict=True):
            match = explorer.matches[query.picture, int(place)]
            assert match.similarity == pytest.approx(similarity, abs=1e-3), "float16 in the store"
    assert all(picture.jpeg and picture.boxes.shape == (5, 4) for picture in explorer.pictures)
    assert "New first answer" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_rerank_without_pictures_shows_names(image_store, image_folder, weights, tmp_path):
    rerank_queries(settings(image_store, image_folder, weights, report=2), tmp_path)
    explorer = ExplorerData.load(tmp_path / "explorer.npz")
    assert len(explorer.queries) == 2
    kept = {query.picture for query in explorer.queries}
    for place, picture in enumerate(explorer.pictures):
        assert bool(picture.jpeg) is (place in kept), "queries were images, the gallery is a store"
    assert explorer.matches == {}


def test_rerank_of_arrays_with_too_few_candidates(tmp_path):
    nodes = torch.rand(4, 3, 8, generator=torch.Generator().manual_seed(0))
    with LocalFeatureStore.create(
        tmp_path / "store", channels=8, nodes=3, global_channels=8
    ) as writer:
        writer.append(np.arange(4), nodes, nodes.mean(dim=1))
    np.save(tmp_path / "queries.npy", nodes[:2].numpy())
    pd.DataFrame({"query": [0, 0, 1], "id": [1, 2, 3], "score": [2.0, 1.0, 1.0]}).to_csv(
        tmp_path / "candidates.csv", index=False
    )
    arrays = RerankQueries(
        store=tmp_path / "store", queries=tmp_path / "queries.npy", k=2, shortlist=2,
        candidates=tmp_path / "candidates.csv", report=5,
        query_vectors=_vectors(tmp_path, nodes[:2]),
    )  # fmt: skip
    rerank_queries(arrays, tmp_path / "out")
    explorer = ExplorerData.load(tmp_path / "out" / "explorer.npz")
    missing = [(query.neighbours < 0).sum() for query in explorer.queries]
    assert sorted(missing) == [0, 2], "one candidate of the second query, in both rows"


def _vectors(folder, nodes):
    np.save(folder / "vectors.npy", nodes.mean(dim=1).numpy())
    return folder / "vectors.npy"


def test_rerank_says_what_is_missing(image_store, image_folder, weights, tmp_path):
    plain = settings(image_store, image_folder, weights, report=None, images=image_folder)
    with pytest.raises(ValueError, match=r"^images: they are for the page"):
        rerank_queries(plain, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (9, 9)).save(other / "a.png")
    with pytest.raises(FileNotFoundError, match="images: none of the answers is among"):
        rerank_queries(replace(plain, report=3, images=other), tmp_path)


def test_pictures_shrink_before_queries_go(
    image_store, image_folder, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr("emd_retrieval.workflows.explorer._SIDES", (40, 20))
    monkeypatch.setattr("emd_retrieval.workflows.explorer._MOST_BYTES", 12 * 1000)
    rerank_queries(settings(image_store, image_folder, weights, images=image_folder), tmp_path)
    explorer = ExplorerData.load(tmp_path / "explorer.npz")
    assert {max(picture.size) for picture in explorer.pictures} == {20}
    assert len(explorer.queries) == 12


@pytest.fixture(scope="module")
def table(tmp_path_factory, cub, trunk_features):
    folder = tmp_path_factory.mktemp("table8")
    settings = Table8(
        recipes=write_recipes(folder / "recipes"), runs=folder / "runs", data=cub,
        losses=["contrastive"], methods=("raw", "fcn"), seeds=1, report=3,
        machine=Machine(cache=trunk_features),
    )  # fmt: skip
    run_table8(settings, folder / "out")
    return folder


def test_table8_writes_its_page(table):
    page = (table / "out" / "report.html").read_text(encoding="utf-8")
    for part in ("Gains over Raw", "<h2>Training</h2>", "Classes", "Explorer"):
        assert part in page
    explorer = ExplorerData.load(table / "out" / "explorer.npz")
    assert explorer.methods == ("Raw, Contrastive", "DeepEMD-F, Contrastive")
    scores = [pd.read_parquet(table / "runs" / "contrastive" / name / "seed0" / "scores.parquet")
              for name in ("raw", "fcn")]  # fmt: skip
    for query in explorer.queries:
        name = explorer.pictures[query.picture].name
        for method, frame in enumerate(scores):
            assert query.scores[method] == pytest.approx(frame.loc[name, "MAP@R"], abs=0.5)


def test_the_runs_alone_give_the_table(table, tmp_path, capsys):
    page = write_report(table / "runs", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Table 8 of the runs in runs" in page
    whole = (table / "out" / "table8.csv").read_text()
    kept = write_charts(table / "runs", tmp_path, formats=["svg"])
    assert [file.name for file in kept] == ["table8.svg", "training.svg"]
    assert "contrastive,fcn" in whole
    command = ["report", str(table / "runs"), "--charts", str(tmp_path / "c"), "--width", "6.8"]
    assert main(command) == 0
    assert "table8.png, table8.svg, training.png" in capsys.readouterr().out
    with Image.open(tmp_path / "c" / "table8.png") as image:
        assert image.width == 1360
    assert main(["report", str(table / "runs"), "--width", "3"]) == 2
    assert "--width goes with --charts" in capsys.readouterr().err


def test_results_by_class_are_means_of_the_runs(table):
    from emd_retrieval.workflows.report_cells import cells_report

    record, _ = cells_report(table / "runs")
    classes = record.tables["classes"].set_index("class")
    raw = pd.read_parquet(table / "runs" / "contrastive" / "raw" / "seed0" / "scores.parquet")
    assert classes["queries"].sum() == len(raw)
    weighted = (classes["Raw"] * classes["queries"]).sum() / len(raw)
    assert weighted == pytest.approx(raw["MAP@R"].mean(), abs=1e-4)
    gain = classes["gain of +DeepEMD-F"]
    assert gain.to_numpy() == pytest.approx((classes["+DeepEMD-F"] - classes["Raw"]).to_numpy())
    assert gain.is_monotonic_decreasing


def test_an_unfinished_table_is_told(tmp_path):
    run = tmp_path / "arcface" / "raw" / "seed0"
    run.mkdir(parents=True)
    (run / "log.csv").write_text("step,loss\n1,0.5\n")
    with pytest.raises(ValueError, match=r"no cell of .* has finished"):
        write_report(tmp_path)


def test_which_cells_are_explored():
    def cell(loss, method, seed=0, control=""):
        return Cell(loss=loss, method=method, seed=seed, control=control)

    assert choose_cells([cell("arcface", "raw"), cell("contrastive", "fcn")]) is None
    cells = [
        cell("arcface", "raw"),
        cell("arcface", "grid"),
        cell("multi_similarity", "raw", 1),
        cell("multi_similarity", "fcn", 1, "mean"),
        cell("multi_similarity", "fcn", 1),
    ]
    assert choose_cells(cells) == (cells[2], cells[4])
    assert choose_cells(cells[:4]) == (cells[0], cells[1])


def test_one_record_is_a_page_beside_it(tmp_path):
    run_demo(TINY, tmp_path)
    page = write_report(tmp_path / "demo.json")
    assert page == tmp_path / "demo.html"
    assert write_charts(tmp_path / "demo.json", tmp_path / "charts") == [], "nothing to draw"
