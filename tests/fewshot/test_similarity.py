"""Similarities inside episodes: those of the matcher, episode by episode, with their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import structured_sets

from emd_retrieval.fewshot import episode_similarity, prepare_sets
from emd_retrieval.fewshot.similarity import MatcherSets, UnitSets
from emd_retrieval.matching import EMDMatcher

SETTINGS: list[dict[str, Any]] = [
    {},
    {"ground_cost": "centered_cosine"},
    {"weight_floor_scale": "absolute", "weight_floor": 0.1},
    {"ground_cost": "centered_cosine", "weight_floor_scale": "absolute"},
    {"weights": "uniform"},
    {"ground_cost": "snr"},
    {"coupling": "dense"},
    {"coupling": "dense", "weights": "uniform"},
    {"weights": "k_means", "clusters": 3},
    {"weights": "mean_shift", "clusters": 4},
]


def sets(generator: torch.Generator, *, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Two episodes: six queries of 5 nodes, four support sets of 7; means are not zero."""
    nodes = structured_sets(20, 7, 12, generator).to(dtype) + 0.5
    return [nodes[:12, :5].unflatten(0, (2, 6)), nodes[12:].unflatten(0, (2, 4))]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(map(str, s.values())) or "-")
def test_equal_to_all_pairs_of_each_episode(
    settings: dict[str, Any], generator: torch.Generator
) -> None:
    matcher = EMDMatcher(**settings)
    query, support = sets(generator)
    found = episode_similarity(
        matcher, prepare_sets(matcher, query), prepare_sets(matcher, support)
    )
    expected = torch.stack([matcher.all_pairs(q, s) for q, s in zip(query, support, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight_gradient", [True, False])
@pytest.mark.parametrize("settings", SETTINGS[:5], ids=lambda s: ",".join(map(str, s.values())))
def test_gradients_are_those_of_all_pairs(
    settings: dict[str, Any], weight_gradient: bool, generator: torch.Generator
) -> None:
    matcher = EMDMatcher(**settings, weight_gradient=weight_gradient)
    query, support = (part.requires_grad_() for part in sets(generator))
    upstream = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    found = episode_similarity(
        matcher, prepare_sets(matcher, query), prepare_sets(matcher, support)
    )
    expected = torch.stack([matcher.all_pairs(q, s) for q, s in zip(query, support, strict=True)])
    gradients = [
        torch.autograd.grad((values * upstream).sum(), (query, support))
        for values in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "kind"), [({}, UnitSets), ({"ground_cost": "snr"}, MatcherSets)]
)
def test_rows_of_a_bank_and_support_places(
    settings: dict[str, Any], kind: type, generator: torch.Generator
) -> None:
    matcher = EMDMatcher(**settings)
    nodes = structured_sets(9, 4, 6, generator)
    bank = prepare_sets(matcher, nodes)
    assert isinstance(bank, kind)
    rows = torch.tensor([[[3, 1, 8], [0, 0, 5]]])
    taken = bank.at(rows)
    assert taken.shape == (1, 2, 3)
    torch.testing.assert_close(taken.nodes, nodes[rows])
    torch.testing.assert_close(taken.of_episode().nodes, nodes[rows].flatten(1, 2))
    places = torch.tensor([4, 1])
    torch.testing.assert_close(taken.of_episode(places).nodes, nodes[rows].flatten(1, 2)[:, places])


def test_nodes_without_direction_cost_one_and_stay_finite() -> None:
    matcher = EMDMatcher(ground_cost="centered_cosine")
    flat = torch.ones(1, 1, 3, 8, requires_grad=True)
    other = torch.rand(1, 2, 3, 8)
    similarity = episode_similarity(
        matcher, prepare_sets(matcher, other), prepare_sets(matcher, flat)
    )
    similarity.sum().backward()
    torch.testing.assert_close(similarity, torch.zeros(1, 2, 1), atol=1e-6, rtol=0)
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())


def test_sets_of_different_matchers_do_not_meet() -> None:
    nodes = torch.rand(1, 2, 3, 4)
    with pytest.raises(TypeError, match="prepared for one matcher"):
        episode_similarity(
            EMDMatcher(),
            prepare_sets(EMDMatcher(), nodes),
            prepare_sets(EMDMatcher(ground_cost="snr"), nodes),
        )
