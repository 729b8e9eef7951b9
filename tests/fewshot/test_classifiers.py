"""Each classifier against its definition in plain loops, and against itself episode by episode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import structured_sets

from emd_retrieval.fewshot import (
    SFC_PAPER,
    SFC_REFERENCE,
    SFC_REFERENCE_EVALUATION,
    EMDFusion,
    EMDMerge,
    EMDNearest,
    EMDPrototype,
    EpisodeClassifier,
    FineTuning,
    FullyConnected,
    LocalKNN,
    MatchingNet,
    PredictionFusion,
    ProtoNet,
    StructuredFC,
)
from emd_retrieval.matching import EMDMatcher

SHORT = FineTuning(learning_rate=0.5, batch_size=3, steps=6)
CLASSIFIERS: dict[str, Callable[[], EpisodeClassifier[Any]]] = {
    "nearest": EMDNearest,
    "fusion": EMDFusion,
    "merge": EMDMerge,
    "prototype": EMDPrototype,
    "sfc": lambda: StructuredFC(fine_tuning=SHORT),
    "dense": lambda: EMDNearest(EMDMatcher(coupling="dense")),
    "protonet": ProtoNet,
    "matching": MatchingNet,
    "fc-dot": lambda: FullyConnected(fine_tuning=SHORT),
    "fc-cosine": lambda: FullyConnected("cosine", fine_tuning=SHORT),
    "knn": LocalKNN,
    "prediction-fusion": PredictionFusion,
}


@pytest.fixture
def episodes(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two episodes, 3-way 2-shot, four queries, 5 nodes of 8 channels."""
    nodes = structured_sets(20, 5, 8, generator)
    return nodes[:12].unflatten(0, (2, 3, 2)), nodes[12:].unflatten(0, (2, 4))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def similarity(query: torch.Tensor, support: torch.Tensor) -> float:
    return float(EMDMatcher().paired(query, support))


def plain(name: str, support: torch.Tensor, query: torch.Tensor) -> float:
    """Logit of one query ``[N, D]`` for one class ``[shot, N, D]``."""
    each = [similarity(query, image) for image in support]
    means = [image.mean(dim=0) for image in support]
    if name == "nearest":
        return 12.5 * max(each)
    if name == "fusion":
        return 12.5 * sum(each) / len(each)
    if name == "merge":
        return 12.5 * similarity(query, torch.cat(list(support)))
    if name == "prototype":
        return 12.5 * similarity(query, sum(support) / len(support))
    if name == "protonet":
        return -float((query.mean(dim=0) - sum(means) / len(means)).square().sum())
    if name == "matching":
        return math.log(sum(math.exp(12.5 * cosine(query.mean(dim=0), mean)) for mean in means))
    if name == "knn":
        total = 0.0
        for node in query:
            best = sorted((cosine(node, s) for image in support for s in image), reverse=True)[:3]
            total += sum(best)
        return 12.5 * total / (3 * len(query))
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["nearest", "fusion", "merge", "prototype", "protonet", "matching", "knn"]
)
def test_logits_are_the_definition(name: str, episodes: tuple[torch.Tensor, torch.Tensor]) -> None:
    support, query = episodes
    expected = torch.tensor(
        [[[plain(name, c, q) for c in s] for q in qs] for s, qs in zip(*episodes, strict=True)]
    )
    torch.testing.assert_close(CLASSIFIERS[name]()(support, query), expected, atol=1e-4, rtol=1e-5)


def test_prediction_fusion_averages_probabilities(
    episodes: tuple[torch.Tensor, torch.Tensor],
) -> None:
    support, query = episodes
    unit = torch.nn.functional.normalize(support, dim=-1)
    for episode in range(2):
        centres = [c.flatten(0, 1).mean(dim=0) for c in unit[episode]]
        for image, logits in zip(
            query[episode], PredictionFusion()(*episodes)[episode], strict=True
        ):
            votes = [
                torch.tensor([12.5 * cosine(node, c) for c in centres]).softmax(0) for node in image
            ]
            torch.testing.assert_close(logits.exp(), sum(votes) / len(votes), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_episodes_do_not_see_each_other(
    name: str, episodes: tuple[torch.Tensor, torch.Tensor]
) -> None:
    support, query = episodes
    classifier = CLASSIFIERS[name]()
    together = classifier(support, query)
    alone = torch.cat([classifier(support[i : i + 1], query[i : i + 1]) for i in range(2)])
    assert together.shape == (2, 4, 3)
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_bank_gives_what_the_features_give(
    name: str, episodes: tuple[torch.Tensor, torch.Tensor]
) -> None:
    support, query = episodes
    classifier = CLASSIFIERS[name]()
    bank = classifier.prepare(torch.cat([support.flatten(0, 2), query.flatten(0, 1)]))
    rows = torch.arange(20)
    from_bank = classifier.logits(bank.at(rows[:12].view(2, 3, 2)), bank.at(rows[12:].view(2, 4)))
    torch.testing.assert_close(from_bank, classifier(support, query), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["nearest", "fusion", "merge", "prototype"])
def test_at_one_shot_all_of_deepemd_is_one(
    name: str, episodes: tuple[torch.Tensor, torch.Tensor]
) -> None:
    support, query = episodes
    torch.testing.assert_close(
        CLASSIFIERS[name]()(support[:, :, :1], query), EMDNearest()(support[:, :, :1], query)
    )


@pytest.mark.parametrize(
    "classifier",
    [
        StructuredFC(fine_tuning=FineTuning(learning_rate=5.0, steps=60)),
        FullyConnected(fine_tuning=FineTuning(learning_rate=1.0, steps=60)),
        FullyConnected("cosine", fine_tuning=FineTuning(learning_rate=0.05, steps=60)),
    ],
    ids=["sfc", "dot", "cosine"],
)
def test_learning_lowers_the_loss_on_the_support_set(
    classifier: EpisodeClassifier[Any], generator: torch.Generator
) -> None:
    support = structured_sets(24, 5, 16, generator).unflatten(0, (2, 4, 3))
    labels = torch.arange(4).repeat_interleave(3).repeat(2)

    def loss(tuned: EpisodeClassifier[Any]) -> float:
        logits = tuned(support, support.flatten(1, 2))
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels))

    learned = loss(classifier)
    classifier.fine_tuning = FineTuning(learning_rate=1.0, steps=0)  # type: ignore[attr-defined]
    assert learned < 0.7 * loss(classifier)


def test_the_structured_layer_starts_from_class_means(
    episodes: tuple[torch.Tensor, torch.Tensor],
) -> None:
    untrained = StructuredFC(fine_tuning=FineTuning(learning_rate=1.0, steps=0))
    torch.testing.assert_close(untrained(*episodes), EMDPrototype()(*episodes))


def test_learning_works_under_no_grad_and_leaves_features_alone(
    episodes: tuple[torch.Tensor, torch.Tensor],
) -> None:
    support, query = episodes
    before = support.clone()
    classifier = CLASSIFIERS["sfc"]()
    with torch.no_grad():
        quiet = classifier(support, query)
    torch.testing.assert_close(quiet, classifier(support, query))
    assert torch.equal(support, before)


def test_gradients_reach_support_and_queries(
    episodes: tuple[torch.Tensor, torch.Tensor],
) -> None:
    support, query = (part.clone().requires_grad_() for part in episodes)
    labels = torch.tensor([0, 1, 2, 0]).repeat(2)
    logits = EMDNearest()(support[:, :, :1], query)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
    for part in (support.grad[:, :, :1], query.grad):  # type: ignore[index]
        assert bool(part.isfinite().all())
        assert float(part.abs().max()) > 1e-4


def test_schedules() -> None:
    steps = list(FineTuning(learning_rate=1, batch_size=5, steps=7).schedule(25))
    assert [len(places) for places in steps] == [5] * 7
    assert all(len(places.unique()) == 5 for places in steps)
    passes = list(FineTuning(learning_rate=1, batch_size=4, passes=2).schedule(25))
    assert [len(places) for places in passes] == [4, 4, 4, 4, 4, 4, 1] * 2
    assert sorted(torch.cat(passes[:7]).tolist()) == list(range(25))
    small = list(FineTuning(learning_rate=1, batch_size=5, steps=2).schedule(3))
    assert [sorted(places.tolist()) for places in small] == [[0, 1, 2]] * 2
    seeds = [
        torch.cat(list(FineTuning(learning_rate=1, steps=3, seed=seed).schedule(9)))
        for seed in (0, 1)
    ]
    assert not torch.equal(*seeds)


def test_named_settings_are_those_of_paper_and_code() -> None:
    assert (SFC_PAPER.steps, SFC_PAPER.batch_size) == (100, 5)
    assert (SFC_REFERENCE.passes, SFC_REFERENCE.batch_size) == (100, 4)
    assert (SFC_REFERENCE.learning_rate, SFC_REFERENCE_EVALUATION.learning_rate) == (0.1, 100.0)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_settings_are_told(name: str) -> None:
    import json

    told = CLASSIFIERS[name]().describe()
    assert told["classifier"] in json.dumps(told)
    assert len(told) > 1


def test_wrong_features_are_refused() -> None:
    support = torch.rand(2, 5, 1, 9, 16)
    with pytest.raises(ValueError, match=r"query: expected shape \[E, Q, N, D\], with E = 2.*got"):
        EMDNearest()(support, torch.rand(1, 10, 9, 16))
    with pytest.raises(ValueError, match=r"query: expected shape .*D = 16"):
        ProtoNet()(support, torch.rand(2, 10, 9, 8))
    with pytest.raises(ValueError, match="at least one image"):
        ProtoNet()(support, torch.rand(2, 0, 9, 16))
    with pytest.raises(TypeError, match="support: expected a floating-point tensor"):
        LocalKNN()(support.long(), torch.rand(2, 10, 9, 16))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FineTuning(learning_rate=1), "steps, passes: expected one of the two"),
        (lambda: FineTuning(learning_rate=1, steps=1, passes=1), "got 1 and 1"),
        (lambda: FineTuning(learning_rate=1, steps=-1), "zero or more"),
        (lambda: FineTuning(learning_rate=0, steps=1), "learning_rate: expected a positive"),
        (lambda: FineTuning(learning_rate=1, steps=1, batch_size=0), "batch_size"),
        (lambda: EMDNearest(temperature=0), "temperature: expected a positive number"),
        (lambda: FullyConnected("euclid"), "metric: expected one of dot, cosine"),
        (lambda: FullyConnected(start="zero"), "start: expected one of random, mean"),
        (lambda: LocalKNN(neighbors=0), "neighbors"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
