"""Re-ranking, searching and tuning from end to end, on stores made by ``extract``."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pytest
import torch
from small_data import BACKBONE, CLASSES, write_images, write_weights

from emd_retrieval._tables import read_table
from emd_retrieval.datasets import UnreadableImageError
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.records import ResultRecord
from emd_retrieval.retrieval import LocalFeatureStore, StoreDamagedError
from emd_retrieval.workflows import (
    ExtractImages,
    RerankQueries,
    SearchImage,
    TrainRecipe,
    TuneReranking,
    extract_images,
    rerank_queries,
    search_image,
    train_recipe,
    tune,
    tune_queries,
)
from emd_retrieval.workflows.queries import read_queries
from emd_retrieval.workflows.train import Machine

COUNT, NODES, CHANNELS = 60, 6, 16


@pytest.fixture(scope="session")
def image_store(tmp_path_factory, image_folder, weights):
    path = tmp_path_factory.mktemp("stores") / "birds.store"
    extract_images(
        ExtractImages(
            images=image_folder, store=path, backbone=BACKBONE, weights=weights, crop=64, resize=64
        )
    )
    return path


@pytest.fixture
def gallery(tmp_path, generator):
    """A store of numbers as ids, with classes that global vectors and nodes know of."""
    labels = torch.arange(COUNT) % 6
    centre = torch.randn(6, NODES, CHANNELS, generator=generator)
    nodes = (centre[labels] + 0.9 * torch.randn(COUNT, NODES, CHANNELS, generator=generator)).relu()
    path = tmp_path / "numbers.store"
    with LocalFeatureStore.create(
        path, channels=CHANNELS, nodes=NODES, codec="float32", global_channels=CHANNELS
    ) as writer:
        writer.append(np.arange(COUNT) + 500, nodes, nodes.mean(dim=1))
    pd.DataFrame({"id": np.arange(COUNT) + 500, "label": labels}).to_csv(
        tmp_path / "labels.csv", index=False
    )
    queries = nodes[:9] + 0.1
    np.savez(
        tmp_path / "queries.npz",
        nodes=queries,
        global_vectors=queries.mean(dim=1),
        ids=np.arange(9) + 500,
    )
    np.save(tmp_path / "queries.npy", queries.flatten(1))
    return path


def settings_of(gallery, **changes):
    here = gallery.parent
    return replace(
        RerankQueries(store=gallery, queries=here / "queries.npz", shortlist=20, k=5), **changes
    )


def test_a_trained_run_makes_the_store_and_the_queries(
    tmp_path, image_folder, recipes, cub, trunk_features
):
    changes = ["model.frozen_trunk=false", "optimization.steps=1", "matching.weight_floor=0.01"]
    run = tmp_path / "run"
    train_recipe(
        TrainRecipe(
            recipe=recipes / "contrastive.yaml", run=run, data=cub, overrides=changes,
            machine=Machine(cache=trunk_features),
        )
    )  # fmt: skip
    path = tmp_path / "trained.store"
    extract_images(ExtractImages(images=image_folder, store=path, model=run))
    store = LocalFeatureStore.open(path)
    assert store.manifest.channels == 8
    assert store.manifest.extractor["crop"] == 32
    queries = RerankQueries(store=path, queries=image_folder, model=run, k=3, shortlist=12)
    record, ranking = rerank_queries(queries, tmp_path / "out")
    first = ranking[ranking["rank"] == 1]
    assert (first["query"] == first["id"]).all()
    assert record.settings["weight_floor"] == 0.01, "as the model was trained"
    other, _ = rerank_queries(replace(queries, matching={"weight_floor": 0.5}), tmp_path / "out")
    assert other.settings["weight_floor"] == 0.5
    with pytest.raises(ValueError, match=r"made with the trained run 'run'; pass it again"):
        rerank_queries(replace(queries, model=None), tmp_path / "out")
    (tmp_path / "other").mkdir()
    train_recipe(
        TrainRecipe(
            recipe=recipes / "contrastive.yaml", run=tmp_path / "other", data=cub,
            overrides=[*changes, "seed=7"], machine=Machine(cache=trunk_features),
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^model_sha256: .*; pass the same run again"):
        rerank_queries(replace(queries, model=tmp_path / "other"), tmp_path / "out")


def test_images_against_an_index_of_the_stores_order(tmp_path, image_folder, image_store, weights):
    store = LocalFeatureStore.open(image_store)
    vectors = torch.nn.functional.normalize(store.global_vectors(), dim=1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())
    faiss.write_index(index, str(tmp_path / "gallery.faiss"))
    record, ranking = rerank_queries(
        RerankQueries(
            store=image_store, queries=image_folder, weights=weights,
            index=tmp_path / "gallery.faiss", k=3, shortlist=12,
        ),
        tmp_path / "out",
    )  # fmt: skip
    first = ranking[ranking["rank"] == 1]
    assert (first["query"] == first["id"]).all()
    np.testing.assert_allclose(first["similarity"], 1, atol=2e-3)
    assert len(ranking) == 12 * 3
    written = pd.read_parquet(tmp_path / "out" / "ranking.parquet")
    pd.testing.assert_frame_equal(written, ranking)
    assert json.loads((tmp_path / "out" / "rerank.json").read_text())["name"] == "rerank"
    assert record.settings["index"] == "gallery.faiss"

    _, others = rerank_queries(
        RerankQueries(
            store=image_store, queries=image_folder, weights=weights, k=3, shortlist=5,
            exclude_self=True, format="csv",
        ),
        tmp_path / "out",
    )  # fmt: skip
    assert (others["query"] != others["id"]).all()
    assert (tmp_path / "out" / "ranking.csv").exists()


def test_arrays_against_a_table_are_what_the_matcher_says(tmp_path, gallery):
    store = LocalFeatureStore.open(gallery)
    rows = [(query, 500 + (7 * query + i) % COUNT, 1 - i / 20) for query in range(9)
            for i in range(15)]  # fmt: skip
    file = tmp_path / "candidates.parquet"
    pd.DataFrame(rows, columns=["query", "id", "score"]).to_parquet(file)
    _, ranking = rerank_queries(
        settings_of(gallery, queries=tmp_path / "queries.npy", candidates=file, k=15)
    )
    queries = torch.from_numpy(np.load(tmp_path / "queries.npy")).view(9, NODES, CHANNELS)
    for query, part in ranking.groupby("query"):
        expected = EMDMatcher().paired(
            queries[query].expand(15, -1, -1), store.nodes(part["id"].to_numpy() - 500)
        )
        np.testing.assert_allclose(part["similarity"], expected, atol=2e-6)
        assert (np.diff(part["score"]) <= 0).all()


def test_own_global_vectors_and_alpha(gallery):
    _, by_emd = rerank_queries(settings_of(gallery))
    record, mixed = rerank_queries(settings_of(gallery, alpha=0.2))
    assert not by_emd["score"].equals(mixed["score"])
    np.testing.assert_array_equal(by_emd["similarity"], by_emd["score"])
    assert record.settings["first_stage"] == "IndexFlatIP"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 21}, r"k: 21 answers do not fit into a shortlist of 20"),
        ({"format": "xml"}, r"format: expected one of parquet, csv; got 'xml'"),
        ({"index_parameters": {"nprobe": 3.0}}, r"index_parameters: they go with index"),
        ({"collection": "birds"}, r"collection: it goes with qdrant"),
        ({"alpha": 1.2}, r"alpha: expected 0 to 1"),
    ],
)
def test_settings_that_do_not_fit(gallery, changes, words):
    with pytest.raises(ValueError, match=words):
        rerank_queries(settings_of(gallery, **changes))


def test_inputs_that_do_not_fit(tmp_path, gallery, image_folder):
    bad = tmp_path / "bad.npy"
    for array, words in (
        (np.ones((3, 4, 8), np.float32), r"nodes of 8 channels, the store numbers\.store of 16"),
        (np.ones((3, 17), np.float32), r"multiple of channels = 16"),
        (np.ones((3, 16), int), r"floating-point sets .* got int64 \[3, 16\]"),
        (np.full((3, 16), np.nan, np.float32), r"queries \(bad\.npy\): expected finite"),
        (np.array([{}], dtype=object), r"bad\.npy is not a readable file"),
    ):
        np.save(bad, array)
        with pytest.raises(ValueError, match=words):
            rerank_queries(settings_of(gallery, queries=bad))
    with pytest.raises(FileNotFoundError, match=r"queries: no file"):
        rerank_queries(settings_of(gallery, queries=tmp_path / "none.npy"))
    with pytest.raises(ValueError, match=r"does not tell what made its features \(no extractor"):
        rerank_queries(settings_of(gallery, queries=image_folder))
    index = faiss.IndexFlatIP(8)
    index.add(np.ones((COUNT + 500, 8), np.float32))
    faiss.write_index(index, str(tmp_path / "other.faiss"))
    with pytest.raises(ValueError, match=r"500 of its 560 ids of other\.faiss \(560 vectors\)"):
        rerank_queries(settings_of(gallery, index=tmp_path / "other.faiss"))
    index = faiss.index_factory(8, "IDMap,Flat")
    index.add_with_ids(np.full((COUNT, 8), 8**-0.5, np.float32), np.arange(COUNT) + 500)
    faiss.write_index(index, str(tmp_path / "other.faiss"))
    with pytest.raises(ValueError, match=r"other\.faiss has 8 dimensions, .* have 16"):
        rerank_queries(settings_of(gallery, index=tmp_path / "other.faiss"))
    with pytest.raises(ValueError, match=r"candidates: there is a first stage already, index"):
        rerank_queries(
            settings_of(gallery, index=tmp_path / "other.faiss", candidates=tmp_path / "c.csv")
        )


def test_an_index_of_numbers_over_a_store_of_names(tmp_path, image_store, image_folder, weights):
    store = LocalFeatureStore.open(image_store)
    vectors = torch.nn.functional.normalize(store.global_vectors(), dim=1).numpy()
    numbers = 1000 - 7 * np.arange(len(store))
    index = faiss.index_factory(vectors.shape[1], "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)
    index.add_with_ids(vectors, numbers)
    faiss.write_index(index, str(tmp_path / "g.faiss"))
    settings = RerankQueries(
        store=image_store, queries=image_folder, weights=weights, index=tmp_path / "g.faiss", k=1,
        shortlist=12,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"g\.faiss has whole numbers of its own .*1000, 993, 986"):
        rerank_queries(settings)
    (tmp_path / "ids.txt").write_text("\n".join(store.ids))
    _, ranking = rerank_queries(replace(settings, index_ids=tmp_path / "ids.txt"))
    assert (ranking["query"] == ranking["id"]).all()


def test_what_lacks_scores_cannot_be_mixed(tmp_path, gallery):
    np.savez(tmp_path / "c.npz", ids=np.arange(500, 518).reshape(9, 2))
    settings = settings_of(gallery, queries=tmp_path / "queries.npy", candidates=tmp_path / "c.npz")
    rerank_queries(replace(settings, k=2))
    with pytest.raises(ValueError, match=r"alpha: expected 1, as .*c\.npz has no scores .* 0\.5"):
        rerank_queries(replace(settings, k=2, alpha=0.5))


def test_a_store_without_sets(tmp_path, gallery):
    LocalFeatureStore.create(
        tmp_path / "none.store", channels=16, nodes=4, global_channels=16
    ).close()
    with pytest.raises(ValueError, match=r"store: expected at least one set in none\.store"):
        rerank_queries(settings_of(gallery, store=tmp_path / "none.store"))


def test_an_altered_id_index_is_damage_and_not_a_strange_candidate(tmp_path, gallery):
    damaged = tmp_path / "damaged.store"
    shutil.copytree(gallery, damaged)
    file = next(damaged.rglob("index-*.bin"))
    data = bytearray(file.read_bytes())
    data[8 * COUNT // 2] ^= 64
    file.write_bytes(data)
    with pytest.raises(StoreDamagedError, match=r"index-60\.bin was altered"):
        rerank_queries(settings_of(gallery, store=damaged))


def test_an_archive_in_place_of_an_array_and_the_other_way_round(tmp_path, gallery):
    nodes = np.ones((2, 4, 16), np.float32)
    np.savez(tmp_path / "vectors.npz", vectors=nodes[:, 0])
    with pytest.raises(ValueError, match=r"query_vectors: expected one array .* with vectors"):
        rerank_queries(settings_of(gallery, query_vectors=tmp_path / "vectors.npz"))
    np.save(tmp_path / "single.npy", nodes)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ValueError, match=r"queries: single\.npz is a single array"):
        rerank_queries(settings_of(gallery, queries=tmp_path / "single.npz"))


def test_a_store_of_another_extractor_is_refused(tmp_path, image_store, image_folder, weights):
    plain = RerankQueries(store=image_store, queries=image_folder, k=2, shortlist=4)
    with pytest.raises(ValueError, match=r"weights\w*: .* pass the same weights file again"):
        rerank_queries(replace(plain, weights=write_weights(tmp_path / "x.safetensors", seed=1)))
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(weights.read_bytes())
    rerank_queries(replace(plain, weights=renamed))
    # Nothing is fetched where the manifest tells of a file.
    with pytest.raises(ValueError, match=r"weights: .*\.safetensors'; expected it again"):
        rerank_queries(plain)
    with pytest.raises(FileNotFoundError, match=r"weights: no file '.*none\.safetensors'"):
        rerank_queries(replace(plain, weights=tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"queries: no folder or file '.*none'"):
        rerank_queries(replace(plain, queries=tmp_path / "none", weights=weights))


def test_empty_folders_and_unreadable_images(tmp_path, image_store, weights):
    empty = tmp_path / "empty"
    empty.mkdir()
    plain = RerankQueries(
        store=image_store, queries=empty, weights=weights, k=2, shortlist=4, format="csv"
    )
    with pytest.raises(FileNotFoundError, match=r"queries: .* has no image"):
        rerank_queries(plain)
    folder = write_images(tmp_path / "photos", per_class=1)
    (folder / "broken.png").write_bytes(b"\x89PNG no picture")
    some = replace(plain, queries=folder)
    output = tmp_path / "out"
    output.mkdir()
    (output / "ranking.csv").write_text("what was there")
    with pytest.raises(UnreadableImageError, match=r"broken\.png.*--skip-errors"):
        rerank_queries(some, output)
    assert (output / "ranking.csv").read_text() == "what was there"
    record, ranking = rerank_queries(replace(some, skip_errors=True), output)
    assert ranking["query"].nunique() == len(CLASSES)
    assert "1 query images could not be read" in record.notes[0]
    assert pd.read_csv(output / "skipped.csv")["id"].tolist() == ["broken.png"]
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 4 images of photos could be read"):
        rerank_queries(replace(some, skip_errors=True))


def test_search_draws_the_answer(tmp_path, image_store, image_folder, weights):
    settings = SearchImage(
        store=image_store, queries=image_folder / "wren" / "01.png", weights=weights, k=4,
        shortlist=8, images=image_folder,
    )  # fmt: skip
    record, ranking = search_image(settings, tmp_path / "out")
    assert ranking["id"].tolist()[0] == "wren/01.png"
    assert record.figures == ("answer.png", "match.png")
    for name in record.figures:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="none of the answers' files"):
        search_image(replace(settings, images=tmp_path), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="image: no file"):
        search_image(replace(settings, queries=tmp_path / "none.png"))


def test_search_by_clusters_draws_the_answer_without_the_match(
    tmp_path, image_store, image_folder, weights
):
    settings = SearchImage(
        store=image_store, queries=image_folder / "wren" / "01.png", weights=weights, k=2,
        shortlist=4, images=image_folder, matching={"weights": "k_means", "clusters": 3},
    )  # fmt: skip
    record, _ = search_image(settings, tmp_path / "out")
    assert record.figures == ("answer.png",)


def test_search_without_an_answer_draws_nothing(tmp_path, image_store, image_folder, weights):
    np.savez(tmp_path / "none.npz", ids=np.array([["", ""]]), queries=np.array(["01.png"]))
    settings = SearchImage(
        store=image_store, queries=image_folder / "wren" / "01.png", weights=weights, k=2,
        shortlist=2, images=image_folder, candidates=tmp_path / "none.npz",
    )  # fmt: skip
    record, ranking = search_image(settings, tmp_path / "out")
    assert ranking.empty
    assert record.figures == ()


def test_tuning_scores_every_setting_and_chooses(tmp_path, gallery):
    settings = TuneReranking(
        store=gallery, queries=tmp_path / "queries.npz", labels=tmp_path / "labels.csv",
        exclude_self=True, alphas=(0.0, 0.5, 1.0), sizes=(5, 30),
    )  # fmt: skip
    record, tuned = tune_queries(settings, tmp_path / "out")
    table = tuned.table
    assert len(table) == 6
    for size in (5, 30):
        alone = table[(table["alpha"] == 0) & (table["shortlist"] == size)].iloc[0]
        assert {name: alone[name] for name in tuned.baseline} == pytest.approx(tuned.baseline)
    chosen = table[(table["alpha"] == tuned.alpha) & (table["shortlist"] == tuned.shortlist)]
    assert chosen["MAP@R"].iloc[0] >= table["MAP@R"].max() - 0.1
    assert (tmp_path / "out" / "tradeoff.png").exists()
    assert record.figures == ("tradeoff.png",)
    alone = tuned.baseline["MAP@R"]
    assert ("re-ranking does not pay" in " ".join(record.notes)) == (
        table["MAP@R"].max() <= alone + 0.1
    )
    # Held against the ranking itself: the same P@1 as rerank gives.
    _, ranking = rerank_queries(
        settings_of(gallery, exclude_self=True, shortlist=30, alpha=0.5, k=1)
    )
    labels = pd.read_csv(tmp_path / "labels.csv").set_index("id")["label"]
    hits = labels[ranking["id"]].to_numpy() == labels[ranking["query"]].to_numpy()
    half = table[(table["alpha"] == 0.5) & (table["shortlist"] == 30)]
    assert half["P@1"].iloc[0] == pytest.approx(100 * hits.mean())
    with pytest.raises(ValueError, match=r"no setting is within 1e-06 ms"):
        tune_queries(replace(settings, budget_ms=1e-6))


def test_tuning_wants_labels_and_depth(tmp_path, gallery):
    settings = TuneReranking(
        store=gallery, queries=tmp_path / "queries.npy", labels=tmp_path / "labels.csv"
    )
    with pytest.raises(ValueError, match=r"query_labels: 9 of 9 queries have no label"):
        tune_queries(settings)
    few = pd.read_csv(tmp_path / "labels.csv").iloc[:50]
    few.to_csv(tmp_path / "few.csv", index=False)
    known = replace(settings, queries=tmp_path / "queries.npz")
    with pytest.raises(ValueError, match=r"labels: 10 of the 60 images of numbers\.store have no"):
        tune_queries(replace(known, labels=tmp_path / "few.csv"))
    np.savez(
        tmp_path / "short.npz",
        ids=np.arange(4)[None].repeat(9, 0) + 500,
        queries=np.arange(9) + 500,
    )
    with pytest.raises(ValueError, match=r"at least 10 a query, the largest R .* got 4"):
        tune_queries(replace(known, candidates=tmp_path / "short.npz"))
    with pytest.raises(ValueError, match=r"sizes: expected at least one"):
        tune_queries(replace(known, sizes=()))


def test_an_index_whose_positions_have_names(tmp_path, image_folder, image_store, weights):
    store = LocalFeatureStore.open(image_store)
    backwards = store.ids[::-1]
    vectors = store.global_vectors(store.rows_of(backwards))
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(torch.nn.functional.normalize(vectors, dim=1).numpy())
    faiss.write_index(index, str(tmp_path / "backwards.faiss"))
    (tmp_path / "ids.txt").write_text("\n".join(backwards))
    settings = RerankQueries(
        store=image_store, queries=image_folder, weights=weights, k=1, shortlist=1,
        index=tmp_path / "backwards.faiss", index_ids=tmp_path / "ids.txt",
    )  # fmt: skip
    _, ranking = rerank_queries(settings)
    assert (ranking["query"] == ranking["id"]).all()
    (tmp_path / "ids.txt").write_text("\n".join(backwards[1:]))
    with pytest.raises(ValueError, match=r"each of the 12 vectors of backwards\.faiss, got 11"):
        rerank_queries(settings)


def test_global_vectors_of_arrays_follow_the_stores_rule(
    tmp_path, image_folder, image_store, weights
):
    store = LocalFeatureStore.open(image_store)
    np.save(tmp_path / "queries.npy", store.nodes())
    by_images = RerankQueries(
        store=image_store, queries=image_folder, weights=weights, k=2, shortlist=2
    )
    _, expected = rerank_queries(by_images)
    _, found = rerank_queries(replace(by_images, queries=tmp_path / "queries.npy"))
    assert found["id"].tolist() == expected["id"].tolist()


def test_global_vectors_that_nodes_do_not_tell_are_asked_for(tmp_path, image_folder, weights):
    path = tmp_path / "flat.store"
    extract_images(
        ExtractImages(
            images=image_folder, store=path, backbone=BACKBONE, weights=weights, crop=64,
            resize=64, pyramid=(2,),
        )
    )  # fmt: skip
    store = LocalFeatureStore.open(path)
    nodes, vectors = store.nodes(torch.arange(2)), store.global_vectors(torch.arange(2))
    np.savez(tmp_path / "alone.npz", nodes=nodes)
    np.savez(tmp_path / "both.npz", nodes=nodes, global_vectors=vectors)
    queries = RerankQueries(store=path, queries=tmp_path / "alone.npz", k=1, shortlist=5)
    with pytest.raises(ValueError, match=r"cannot be told from nodes; pass those of the queries"):
        rerank_queries(queries)
    _, ranking = rerank_queries(replace(queries, queries=tmp_path / "both.npz"))
    assert ranking["id"].tolist() == store.ids_at(torch.arange(2))


def test_a_ranking_of_an_earlier_run_goes(tmp_path, gallery):
    out = tmp_path / "out"
    rerank_queries(settings_of(gallery), out)
    rerank_queries(settings_of(gallery, format="csv", k=2), out)
    assert [file.name for file in out.glob("ranking.*")] == ["ranking.csv"]
    rerank_queries(settings_of(gallery, k=3), out)
    assert [file.name for file in out.glob("ranking.*")] == ["ranking.parquet"]
    assert len(pd.read_parquet(out / "ranking.parquet")) == 9 * 3


def test_pictures_of_an_earlier_search_go(tmp_path, image_store, image_folder, weights):
    settings = SearchImage(
        store=image_store, queries=image_folder / "wren" / "01.png", weights=weights, k=2,
        shortlist=4, images=image_folder,
    )  # fmt: skip
    search_image(settings, tmp_path)
    assert (tmp_path / "answer.png").is_file()
    search_image(replace(settings, images=None), tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".png"]


def test_a_query_is_left_out_whatever_its_path_begins_with(
    tmp_path, image_store, image_folder, weights, monkeypatch
):
    """A single file's id is its bare name, a subfolder's begins below it; the store's do not."""
    plain = RerankQueries(store=image_store, queries=image_folder, weights=weights, k=1,
                          shortlist=5, exclude_self=True)  # fmt: skip

    def itself(queries):
        _, ranking = rerank_queries(replace(plain, queries=queries))
        return ranking["id"].tolist()

    assert "wren/01.png" not in itself(image_folder / "wren" / "01.png")
    below = [f"wren/{Path(name).name}" for name in sorted((image_folder / "wren").iterdir())]
    assert not [a for a, b in zip(itself(image_folder / "wren"), below, strict=True) if a == b]
    monkeypatch.chdir(image_folder / "wren")
    assert "wren/01.png" not in itself(Path("01.png"))
    # The same name somewhere else is another image.
    (tmp_path / "tit").mkdir()
    shutil.copy(image_folder / "wren" / "01.png", tmp_path / "tit" / "elsewhere.png")
    with pytest.warns(UserWarning, match=r"exclude_self: none of the 1 queries is in the store"):
        assert itself(tmp_path / "tit" / "elsewhere.png") == ["wren/01.png"]


def test_ids_that_an_archive_of_queries_names_twice(tmp_path, gallery):
    arrays = dict(np.load(tmp_path / "queries.npz"))
    arrays["ids"][3] = arrays["ids"][1]
    np.savez(tmp_path / "twice.npz", **arrays)
    with pytest.raises(ValueError, match=r"expected each id of twice\.npz once, got 501 2 times"):
        rerank_queries(settings_of(gallery, queries=tmp_path / "twice.npz"))


def test_index_of_other_norms_from_the_command(tmp_path, gallery):
    vectors = 3 * LocalFeatureStore.open(gallery).global_vectors().numpy()
    index = faiss.index_factory(CHANNELS, "IDMap,Flat", faiss.METRIC_L2)
    index.add_with_ids(vectors, np.arange(COUNT) + 500)
    faiss.write_index(index, str(tmp_path / "long.faiss"))
    long = settings_of(gallery, index=tmp_path / "long.faiss", shortlist=60)
    with pytest.raises(ValueError, match=r"normalize: long\.faiss compares by L2 .*--no-normalize"):
        rerank_queries(long)
    _, ranking = rerank_queries(replace(long, normalize=False))
    assert set(ranking["query"]) == set(range(500, 509))


def test_r_counts_the_query_only_where_the_gallery_has_it_under_the_same_label(tmp_path, gallery):
    labels = pd.read_csv(tmp_path / "labels.csv")
    own = labels.iloc[:9].copy()
    own.loc[0, "label"] = 3  # the gallery has this query under 0
    own.to_csv(tmp_path / "own.csv", index=False)
    settings = TuneReranking(
        store=gallery, queries=tmp_path / "queries.npz", labels=tmp_path / "labels.csv",
        query_labels=tmp_path / "own.csv", exclude_self=True, alphas=(1.0,), sizes=(5,),
    )  # fmt: skip
    store = LocalFeatureStore.open(gallery)
    label_of = dict(zip(labels["id"], labels["label"], strict=True))
    queries = read_queries(settings, store)
    asked = own["label"].tolist()
    relevant = tune._relevant(settings, queries, store, asked, label_of)
    assert relevant.tolist() == [10, *[9] * 8]


def test_names_that_are_no_utf_8_are_written_down(tmp_path, image_folder, weights):
    folder = tmp_path / "birds"
    shutil.copytree(image_folder / "wren", folder)
    odd = os.fsdecode(b"wr\xe9n.png")
    shutil.copy(folder / "01.png", folder / odd)
    store = tmp_path / "odd.store"
    extract_images(
        ExtractImages(
            images=folder, store=store, backbone=BACKBONE, weights=weights, crop=64, resize=64
        )
    )
    for suffix in ("parquet", "csv"):
        settings = RerankQueries(
            store=store, queries=folder, weights=weights, k=2, shortlist=5, format=suffix
        )
        _, ranking = rerank_queries(settings, tmp_path / "out")
        assert odd in ranking["query"].tolist()
        read = read_table(tmp_path / "out" / f"ranking.{suffix}", ("query", "id"))
        assert "wr\\udce9n.png" in read["query"].tolist()
    record, answers = search_image(
        SearchImage(store=store, queries=folder / odd, weights=weights, k=2, shortlist=5,
                    images=folder), tmp_path / "one")  # fmt: skip
    assert odd in answers["id"].tolist()
    assert (
        "wr\\udce9n.png" in ResultRecord.load(tmp_path / "one" / "search.json").table["id"].tolist()
    )
    assert record.figures


def test_files_with_a_byte_order_mark(tmp_path, image_folder, image_store, weights):
    """Windows' editors begin text with one."""
    names = sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    text = "\ufeff" + "\r\n".join(names) + "\r\n"
    (tmp_path / "names.txt").write_bytes(text.encode())
    vectors = LocalFeatureStore.open(image_store).global_vectors()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(torch.nn.functional.normalize(vectors).numpy())
    faiss.write_index(index, str(tmp_path / "birds.faiss"))
    settings = RerankQueries(
        store=image_store, queries=image_folder, weights=weights, k=1, shortlist=3,
        index=tmp_path / "birds.faiss", index_ids=tmp_path / "names.txt",
    )  # fmt: skip
    _, ranking = rerank_queries(settings)
    assert ranking["id"].tolist() == ranking["query"].tolist()
