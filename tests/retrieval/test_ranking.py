import pytest
import torch

from emd_retrieval.retrieval import Ranking, rank_by


def test_rank_by_is_a_stable_sort(generator):
    scores = torch.randint(4, (6, 9), generator=generator).float()
    ranking = rank_by(scores, 9)
    for row in range(6):
        expected = sorted(range(9), key=lambda i, row=row: (-scores[row, i].item(), i))
        assert ranking.rows[row].tolist() == expected
        assert torch.equal(ranking.scores[row], scores[row, ranking.rows[row]])


def test_rank_by_leaves_out_what_is_excluded(generator):
    scores = torch.randn(4, 7, generator=generator)
    kept = scores.clone()
    exclude = torch.tensor([3, 0, 6, 3])
    ranking = rank_by(scores, 6, exclude=exclude)
    assert torch.equal(scores, kept), "the caller's matrix is not changed"
    for row in range(4):
        assert sorted(ranking.rows[row].tolist()) == sorted({*range(7)} - {int(exclude[row])})
    with pytest.raises(ValueError, match="k: expected 1 to 6, got 7"):
        rank_by(scores, 7, exclude=exclude)
    with pytest.raises(ValueError, match="k: expected 1 to 7, got 0"):
        rank_by(scores, 0)
    with pytest.raises(ValueError, match=r"scores: expected shape \[Q, R\], got \[7\]"):
        rank_by(scores[0], 1)


def test_reordered_moves_the_head_and_keeps_the_tail():
    first = Ranking(
        torch.tensor([[5, 3, 8, 1, 0], [1, 2, 3, 4, 5]]), torch.linspace(1, 0, 5).expand(2, 5)
    )
    again = first.reordered(torch.tensor([[0.1, 0.9, 0.1], [0.3, 0.3, 0.5]]))
    assert again.rows.tolist() == [[3, 5, 8, 1, 0], [3, 1, 2, 4, 5]], "ties keep their order"
    torch.testing.assert_close(again.scores[:, :3].sum(1), torch.tensor([1.1, 1.1]))
    assert torch.isneginf(again.scores[:, 3:]).all()


def test_reordered_in_full_and_not_at_all():
    first = Ranking(torch.tensor([[5, 3, 8]]), torch.tensor([[0.9, 0.8, 0.7]]))
    assert first.reordered(torch.tensor([[1.0, 2.0, 3.0]])).rows.tolist() == [[8, 3, 5]]
    assert first.reordered(torch.zeros(1, 0)).rows.tolist() == [[5, 3, 8]]
    with pytest.raises(ValueError, match="scores: expected at most 3 a query, got 4"):
        first.reordered(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"scores: expected shape \[1, C\], got \[2, 3\]"):
        first.reordered(torch.zeros(2, 3))


def test_top_and_shapes():
    ranking = Ranking(torch.tensor([[5, 3, 8]]), torch.tensor([[0.9, 0.8, 0.7]]))
    assert (len(ranking), ranking.depth, ranking.top(2).depth) == (1, 3, 2)
    with pytest.raises(ValueError, match=r"scores: expected shape \[Q, K\], with Q = 1, K = 3"):
        Ranking(torch.tensor([[5, 3, 8]]), torch.zeros(1, 2))
