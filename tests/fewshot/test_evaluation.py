"""Accuracy over episodes: known answers, the interval's formula, batching, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from emd_retrieval.fewshot import (
    EMDNearest,
    EpisodeScores,
    FineTuning,
    ProtoNet,
    StructuredFC,
    draw_episodes,
    evaluate_episodes,
)

LABELS = torch.arange(6).repeat_interleave(20)


@pytest.fixture
def nodes(generator: torch.Generator) -> torch.Tensor:
    centres = torch.randn(6, 4, 16, generator=generator)
    return centres[LABELS] + 1.5 * torch.randn(120, 4, 16, generator=generator)


def test_mean_and_interval() -> None:
    scores = EpisodeScores(torch.tensor([0.5, 1.0, 0.75, 0.75], dtype=torch.float64))
    spread = math.sqrt((0.0625 + 0.0625) / 3)
    assert scores.mean == 0.75
    assert scores.interval == pytest.approx(1.96 * spread / 2)
    assert str(scores) == "75.00 ± 20.00"
    assert math.isnan(EpisodeScores(torch.ones(1)).interval)


def test_accuracies_are_shares_of_right_queries(nodes: torch.Tensor) -> None:
    episodes = draw_episodes(LABELS, way=3, shot=2, queries=4, count=9)
    scores = evaluate_episodes(ProtoNet(), nodes, episodes)
    vectors = nodes.mean(dim=1)
    for episode in range(9):
        right = 0
        centres = vectors[episodes.support[episode]].mean(dim=1)
        for number in range(3):
            for row in episodes.query[episode, number]:
                right += int((vectors[row] - centres).norm(dim=1).argmin()) == number
        assert float(scores.accuracies[episode]) == pytest.approx(right / 12)
    assert 1 / 3 < scores.mean < 1


@pytest.mark.parametrize(
    "classifier",
    [EMDNearest(), StructuredFC(fine_tuning=FineTuning(learning_rate=1.0, steps=5))],
    ids=["nearest", "sfc"],
)
def test_batches_of_episodes_change_nothing(
    classifier: EMDNearest | StructuredFC, nodes: torch.Tensor
) -> None:
    episodes = draw_episodes(LABELS, shot=2, queries=3, count=12)
    whole, single = (
        evaluate_episodes(classifier, nodes, episodes, memory_mb=mb).accuracies for mb in (50, 1e-6)
    )
    assert torch.equal(whole, single)
    assert torch.equal(
        whole[4:6], evaluate_episodes(classifier, nodes, episodes.at([4, 5])).accuracies
    )


def test_bad_input(nodes: torch.Tensor) -> None:
    episodes = draw_episodes(LABELS, queries=3, count=2)
    with pytest.raises(
        ValueError, match=r"episodes: expected rows of nodes, 0 to 49, got .* another"
    ):
        evaluate_episodes(ProtoNet(), nodes[:50], episodes)
    with pytest.raises(ValueError, match="episodes: expected at least one"):
        evaluate_episodes(ProtoNet(), nodes, episodes.at([]))
    broken = nodes.clone()
    broken[3, 0, 2] = math.nan
    with pytest.raises(
        ValueError, match=r"nodes: expected finite values, got 1 .* NaN at index .3, 0"
    ):
        evaluate_episodes(ProtoNet(), broken, episodes)
    with pytest.raises(ValueError, match="memory_mb"):
        evaluate_episodes(ProtoNet(), nodes, episodes, memory_mb=0)
