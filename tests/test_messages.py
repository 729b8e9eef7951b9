"""What the public functions say of bad arguments: which one, what was expected, what came.

A row a public name at least; each is called as it should be, but for one argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_public_api import PUBLIC

import emd_retrieval as e

SETS = torch.rand(4, 5, 8, generator=torch.Generator().manual_seed(0))
COST = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(1))
SUPPLY, DEMAND = torch.ones(2, 5) / 5, torch.ones(2, 6) / 6
NAN = SETS.clone()
NAN[1, 2, 3] = float("nan")
PIXELS = np.zeros((2, 4, 4, 3), np.uint8)


def backbone() -> Any:
    return e.load_backbone("test_resnet", pretrained=False)


def extractor() -> Any:
    return e.FCNExtractor(backbone())


def features(**changes: Any) -> Any:
    parts = {"nodes": SETS, "global_vectors": SETS.mean(1), "labels": torch.tensor([0, 0, 1, 1]),
             "ids": torch.arange(4)}  # fmt: skip
    return e.FeatureSet(**{**parts, **changes})


def store(path: Any) -> Any:
    folder = path / "sets.store"
    with e.LocalFeatureStore.create(folder, channels=8, nodes=5) as writer:
        writer.append(np.arange(4), SETS)
    return e.LocalFeatureStore.open(folder)


def recipe(path: Any, text: str) -> Any:
    (path / "recipe.yaml").write_text(text)
    return e.load_recipe(path / "recipe.yaml")


def loss(**changes: Any) -> Any:
    settings = e.LossSettings(name="contrastive", **changes)
    return e.build_loss(settings, num_classes=2, channels=8, nodes=5)


Call = Callable[[Any], Any]
# Public name, argument, the call, what must be said besides "expected" and "got".
ROWS: list[tuple[str, str, Call, str]] = [
    ("emd", "cost", lambda p: e.emd(COST[0, 0], SUPPLY, DEMAND), r"\[6\]"),
    ("emd", "supply", lambda p: e.emd(COST, SUPPLY[:, :3], DEMAND), r"\[2, 3\]"),
    ("emd", "demand", lambda p: e.emd(COST, SUPPLY, -DEMAND), "-0.1"),
    ("emd", "supply, demand", lambda p: e.emd(COST, SUPPLY, 2 * DEMAND), "2"),
    ("emd", "solver", lambda p: e.emd(COST, SUPPLY, DEMAND, solver="simplx"), "'simplex'"),
    ("emd", "cost", lambda p: e.emd(COST.numpy(), SUPPLY, DEMAND), "ndarray"),
    ("solve", "cost", lambda p: e.solve(COST.int(), SUPPLY, DEMAND), "int32"),
    ("solve", "solver", lambda p: e.solve(COST, SUPPLY, DEMAND, solver="cv2"), "'cv2'"),
    ("solve_top_k", "k", lambda p: e.solve_top_k(COST, SUPPLY, DEMAND, 0), "0"),
    ("lower_bound", "demand", lambda p: e.lower_bound(COST, SUPPLY, DEMAND[:, 1:]), r"\[2, 5\]"),
    ("EMDMatcher", "weights", lambda p: e.EMDMatcher(weights="even"), "'even'"),
    ("EMDMatcher", "weight_floor", lambda p: e.EMDMatcher(weight_floor=-1), "-1"),
    ("EMDMatcher", "query", lambda p: e.EMDMatcher().paired(SETS[0, 0], SETS[0]), r"\[8\]"),
    ("EMDMatcher", "reference", lambda p: e.EMDMatcher().all_pairs(SETS, SETS[..., 1:]), "7"),
    ("SetMatch", "query", lambda p: e.EMDMatcher().match(NAN[0, 0], SETS[0]), r"\[8\]"),
    ("cluster_nodes", "method", lambda p: e.cluster_nodes(SETS, "median"), "'median'"),
    ("cluster_nodes", "clusters", lambda p: e.cluster_nodes(SETS, "k_means", clusters=0), "0"),
    ("cross_reference_weights", "floor",
     lambda p: e.cross_reference_weights(SETS, SETS, floor=-0.5), "-0.5"),
    ("ground_cost", "ground_cost", lambda p: e.ground_cost("cosin"), "'cosine'"),
    ("load_backbone", "backbone", lambda p: e.load_backbone("resnet5"), "resnet5"),
    ("Backbone", "images", lambda p: backbone()(torch.zeros(3, 32, 32)), r"\[3, 32, 32\]"),
    ("build_extractor", "extractor", lambda p: e.build_extractor("fnc", backbone()), "'fcn'"),
    ("FCNExtractor", "pyramid", lambda p: e.FCNExtractor(backbone(), pyramid=(3, 0)), "0"),
    ("GridExtractor", "grid", lambda p: e.GridExtractor(backbone(), grid=()), "none"),
    ("SamplingExtractor", "patches", lambda p: e.SamplingExtractor(backbone(), patches=0), "0"),
    ("Extractor", "crop",
     lambda p: extractor().evaluation_transform(resize=10, crop=11), "got 11"),
    ("extract_features", "batch_size",
     lambda p: e.extract_features(e.ImageDataset(e.demo_birds(2, 1, size=32)), extractor(),
                                  batch_size=0), "0"),
    ("global_vectors", "global_node", lambda p: e.global_vectors(SETS, 5), "5"),
    ("pack", "sets", lambda p: e.pack(SETS[0]), r"\[5, 8\]"),
    ("unpack", "packed", lambda p: e.unpack(torch.zeros(2, 9), 4), r"\[2, 9\]"),
    ("unpack", "channels", lambda p: e.unpack(torch.zeros(2, 9), 0), "0"),
    ("pyramid_pool", "sizes", lambda p: e.pyramid_pool(torch.zeros(1, 2, 4, 4), [0]), "0"),
    ("FeatureSet", "nodes", lambda p: e.evaluate_sets(features(nodes=SETS[0])), r"\[5, 8\]"),
    ("evaluate_sets", "shortlist", lambda p: e.evaluate_sets(features(), shortlist=0), "0"),
    ("Evaluation", "gallery", lambda p: e.evaluate_sets(features(), features(nodes=SETS[..., :4])),
     "4"),
    ("score_ranking", "ranking",
     lambda p: e.score_ranking(e.Ranking(torch.tensor([[9]]), torch.zeros(1, 1)),
                               torch.tensor([0]), torch.tensor([0])), "9"),
    ("Ranking", "scores", lambda p: e.Ranking(torch.zeros(2, 3).long(), torch.zeros(2, 2)),
     r"\[2, 2\]"),
    ("compare_rankings", "rankings", lambda p: e.compare_rankings({}, torch.tensor([0])), "none"),
    ("search_sets", "k",
     lambda p: e.search_sets(SETS, SETS, 0, matcher=e.EMDMatcher(), shortlist=None), "0"),
    ("FaissShortlist", "vectors", lambda p: e.FaissShortlist(SETS), r"\[4, 5, 8\]"),
    ("EMDKNN", "channels", lambda p: e.EMDKNN(channels=0), "0"),
    ("EMDKNN", "reference", lambda p: e.EMDKNN(channels=7)(SETS.flatten(1), 1, SETS.flatten(1)),
     r"\[4, 40\]"),
    ("EMDReranker", "candidate_ids",
     lambda p: e.EMDReranker(store(p)).rerank(SETS, np.zeros((3, 2), int), k=1), "3"),
    ("EMDReranker", "k",
     lambda p: e.EMDReranker(store(p)).rerank(SETS, np.zeros((4, 1), int), k=0), "0"),
    ("LocalFeatureStore", "codec",
     lambda p: e.LocalFeatureStore.create(p / "s", channels=8, nodes=5, codec="float8"),
     "'float8'"),
    ("LocalFeatureStore", "rows", lambda p: store(p).nodes([9]), "9"),
    ("ImageCollection", "images",
     lambda p: e.ImageCollection("x", PIXELS.astype(float), np.zeros(2, int), ("a",), (1,)),
     "float64"),
    ("ImageCollection", "classes", lambda p: e.demo_birds(2, 1, size=32).select_classes("a-b"),
     "'a-b'"),
    ("ImageDataset", "labels",
     lambda p: e.ImageDataset(e.ImageCollection("x", PIXELS, np.zeros(3, int), ("a",), (1,))),
     r"\[3\]"),
    ("demo_birds", "num_species", lambda p: e.demo_birds(0), "0"),
    ("DeepEMDDistance", "channels", lambda p: e.DeepEMDDistance(channels=0), "0"),
    ("DeepEMDSimilarity", "query_emb|embeddings|query|packed",
     lambda p: e.DeepEMDSimilarity(channels=7)(SETS.flatten(1)), r"\[4, 40\]"),
    ("DeepEMDSNRDistance", "matcher",
     lambda p: e.DeepEMDSNRDistance(channels=8, matcher=e.EMDMatcher()), "'cosine'"),
    ("LossSettings", "name|loss.name",
     lambda p: e.build_loss(e.LossSettings(name="contrast"), num_classes=2, channels=8, nodes=5),
     "'contrastive'"),
    ("build_loss", "num_classes",
     lambda p: e.build_loss(e.LossSettings(name="arcface"), num_classes=0, channels=8, nodes=5),
     "0"),
    ("MetricLoss", "labels", lambda p: loss()(SETS.flatten(1), torch.tensor([0, 0, 1])), r"\[3\]"),
    ("Recipe", "loss.name", lambda p: recipe(p, "loss: {name: contrast}\n"), "'contrast'"),
    ("load_recipe", "optimization.steps",
     lambda p: recipe(p, "loss: {name: contrastive}\noptimization: {steps: many}\n"), "'many'"),
    ("train", "optimization.batch_size",
     lambda p: recipe(p, "loss: {name: contrastive}\noptimization: {batch_size: 1}\n"), "1"),
    ("ResultRecord", "tables",
     lambda p: e.ResultRecord(name="x", title="", tables={}, settings={}, data={}, seed=0),
     "none"),
    ("ResultRecord", "name",
     lambda p: e.ResultRecord(name="a/b", title="", tables={}, settings={}, data={}, seed=0),
     "'a/b'"),
]  # fmt: skip

# Names that take nothing of a user's, are results, or whose errors are of missing files.
WITHOUT = {
    "TrainedModel", "TransportPlan", "available_solvers", "load_images", "load_model",
    "raise_pending_faults",
}  # fmt: skip


def test_every_public_name_has_a_row() -> None:
    assert {row[0] for row in ROWS} | WITHOUT == set(PUBLIC)


@pytest.mark.parametrize(
    ("name", "argument", "call", "told"),
    ROWS,
    ids=[f"{name}-{argument}-{number}" for number, (name, argument, *_) in enumerate(ROWS)],
)
def test_the_message_names_argument_got_and_expected(
    name: str, argument: str, call: Call, told: str, tmp_path: Any
) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call(tmp_path)
    # What is wrong in a file comes after the file's name.
    message = str(caught.value).removeprefix(f"recipe {tmp_path / 'recipe.yaml'}: ")
    assert re.match(rf"(?:{argument})(?: \(.*?\))?: ", message), message
    assert "expected" in message, message
    assert "got" in message, message
    assert re.search(told, message), message
    assert "\n" not in message
    assert len(message) < 400
