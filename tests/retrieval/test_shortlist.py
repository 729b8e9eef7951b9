import pytest
import torch
import torch.nn.functional as F

from emd_retrieval.retrieval import FaissShortlist


@pytest.mark.parametrize("k", [1, 7, 40])
def test_equals_brute_force(k, generator):
    gallery = torch.randn(40, 6, generator=generator) * torch.rand(40, 1, generator=generator)
    query = torch.randn(9, 6, generator=generator)
    cosine = F.normalize(query) @ F.normalize(gallery).mT
    expected = cosine.sort(dim=1, descending=True)
    ranking = FaissShortlist(gallery).search(query, k)
    assert torch.equal(ranking.rows, expected.indices[:, :k])
    torch.testing.assert_close(ranking.scores, expected.values[:, :k])


def test_leaves_itself_out(generator):
    vectors = torch.randn(12, 4, generator=generator)
    itself = torch.arange(12)
    ranking = FaissShortlist(vectors).search(vectors, 11, exclude=itself)
    for row in range(12):
        assert sorted(ranking.rows[row].tolist()) == sorted({*range(12)} - {row})
    assert (ranking.scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_duplicates_do_not_bring_itself_back(k):
    """FAISS may list equals of a query before the query, or instead of it."""
    vectors = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]])
    ranking = FaissShortlist(vectors).search(vectors, k, exclude=torch.arange(7))
    assert ranking.rows.shape == (7, k)
    for row in range(7):
        answer = ranking.rows[row].tolist()
        assert row not in answer
        assert len(set(answer)) == k
        if row < 6:
            assert set(answer) <= set(range(6))


def test_length_of_vectors_does_not_matter(generator):
    vectors = torch.randn(12, 4, generator=generator)
    query = torch.randn(3, 4, generator=generator)
    scaled = FaissShortlist(vectors * 50).search(query * 0.01, 12)
    assert torch.equal(scaled.rows, FaissShortlist(vectors).search(query, 12).rows)


def test_refuses_bad_input(generator):
    vectors = torch.randn(5, 4, generator=generator)
    index = FaissShortlist(vectors)
    with pytest.raises(ValueError, match=r"k: expected 1 to 5 \(the gallery\), got 6"):
        index.search(vectors, 6)
    with pytest.raises(ValueError, match=r"k: expected 1 to 4 \(the gallery\), got 5"):
        index.search(vectors, 5, exclude=torch.arange(5))
    with pytest.raises(ValueError, match=r"queries: expected shape \[Q, 4\], got \[5, 3\]"):
        index.search(vectors[:, :3], 1)
    with pytest.raises(ValueError, match="vectors: expected at least one vector, got"):
        FaissShortlist(vectors[:0])
    with pytest.raises(TypeError, match="vectors: expected a floating-point tensor"):
        FaissShortlist(vectors.long())
    broken = vectors.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"vectors: .* first is NaN at index \[2, 1\]"):
        FaissShortlist(broken)
    with pytest.raises(ValueError, match=r"queries: .* first is NaN at index \[2, 1\]"):
        index.search(broken, 1)
