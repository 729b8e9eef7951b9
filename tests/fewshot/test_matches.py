"""Records of matches: which pairs, that they are the matcher's, and that files keep them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from emd_retrieval.fewshot import EpisodeMatches, draw_episodes, episode_matches
from emd_retrieval.matching import EMDMatcher

LABELS = torch.arange(4).repeat_interleave(8)


@pytest.fixture
def nodes(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(32, 5, 6, generator=generator)


@pytest.mark.parametrize("boxes_each", [False, True])
def test_pairs_and_matches(
    boxes_each: bool, nodes: torch.Tensor, generator: torch.Generator
) -> None:
    episodes = draw_episodes(LABELS, way=3, shot=2, queries=4, count=3)
    boxes = torch.rand(*([32] if boxes_each else []), 5, 4, generator=generator)
    matcher = EMDMatcher()
    found = episode_matches(matcher, nodes, episodes, 1, boxes=boxes, queries=2)
    assert len(found) == 6 * 6
    assert found.query.tolist() == [
        int(row) for row in episodes.query[1, :, :2].flatten() for _ in range(6)
    ]
    assert found.support.tolist() == episodes.support[1].flatten().tolist() * 6
    assert torch.equal(found.same_class, LABELS[found.query] == LABELS[found.support])
    expected = matcher.match(nodes[found.query], nodes[found.support])
    torch.testing.assert_close(found.similarity, expected.similarity)
    torch.testing.assert_close(found.flow.sum(dim=2), found.query_weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.flow.sum(dim=1), found.support_weights, atol=1e-6, rtol=0)
    for side, rows in ((found.query_boxes, found.query), (found.support_boxes, found.support)):
        assert torch.equal(side, boxes[rows] if boxes_each else boxes.expand(36, 5, 4))


def test_files_keep_everything(nodes: torch.Tensor, tmp_path: Path) -> None:
    episodes = draw_episodes(LABELS, way=3, queries=4, count=1)
    found = episode_matches(EMDMatcher(), nodes, episodes, 0, boxes=torch.rand(5, 4))
    loaded = EpisodeMatches.load(found.save(tmp_path / "matches.npz"))
    for part in fields(EpisodeMatches):
        assert torch.equal(getattr(found, part.name), getattr(loaded, part.name)), part.name
    assert [file.name for file in tmp_path.iterdir()] == ["matches.npz"]


def test_bad_input(nodes: torch.Tensor, tmp_path: Path) -> None:
    episodes = draw_episodes(LABELS, way=3, queries=4, count=1)
    boxes = torch.rand(5, 4)
    with pytest.raises(ValueError, match="queries: expected 1 to 4, got 5"):
        episode_matches(EMDMatcher(), nodes, episodes, 0, boxes=boxes, queries=5)
    with pytest.raises(ValueError, match=r"boxes: expected shape \[N, 4\], with N = 5"):
        episode_matches(EMDMatcher(), nodes, episodes, 0, boxes=boxes[:4])
    with pytest.raises(IndexError):
        episode_matches(EMDMatcher(), nodes, episodes, 1, boxes=boxes)
    found = episode_matches(EMDMatcher(), nodes, episodes, 0, boxes=boxes)
    with pytest.raises(ValueError, match=r"ends in \.npz, got matches"):
        found.save(tmp_path / "matches")
    np.savez(tmp_path / "other.npz", flow=np.zeros(3))
    with pytest.raises(ValueError, match="not a record of matches; cost, query, "):
        EpisodeMatches.load(tmp_path / "other.npz")
