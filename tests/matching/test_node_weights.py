import pytest
import torch

from emd_retrieval.matching import (
    WeighedNodes,
    cross_reference_weights,
    node_weights,
    normalize_weights,
)


def reference_code_weights(query, reference, floor=1e-3):
    """Equations 11 and 12 in plain loops, with the reference code's absolute floor."""
    mean = sum(reference) / len(reference)
    scores = torch.stack([torch.clamp(u @ mean, min=0) + floor for u in query])
    return scores / scores.sum()


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 9), (1, 5)])
def test_absolute_floor_is_the_reference_code(n, m, generator):
    query = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    reference = torch.randn(m, 6, generator=generator, dtype=torch.float64)
    supply, demand = cross_reference_weights(query, reference, floor_scale="absolute")
    torch.testing.assert_close(supply, reference_code_weights(query, reference))
    torch.testing.assert_close(demand, reference_code_weights(reference, query))


@pytest.mark.parametrize("name", ["cross_reference", "uniform"])
def test_all_pairs_agree_with_paired(name, generator):
    query = torch.randn(3, 4, 6, generator=generator)
    reference = torch.randn(5, 7, 6, generator=generator)
    weights = node_weights(name)
    supply, demand = weights.all_pairs(WeighedNodes.of(query), WeighedNodes.of(reference))
    assert supply.shape == (3, 5, 4)
    assert demand.shape == (3, 5, 7)
    for i in range(3):
        for j in range(5):
            one_supply, one_demand = weights.paired(
                WeighedNodes.of(query[i]), WeighedNodes.of(reference[j])
            )
            torch.testing.assert_close(supply[i, j], one_supply)
            torch.testing.assert_close(demand[i, j], one_demand)


@pytest.mark.parametrize("name", ["cross_reference", "uniform"])
def test_shortlists_agree_with_all_pairs(name, generator):
    query = WeighedNodes.of(torch.randn(3, 4, 6, generator=generator))
    reference = WeighedNodes.of(torch.randn(5, 7, 6, generator=generator))
    candidates = torch.tensor([[0, 4], [2, 2], [3, 1]])
    every = node_weights(name).all_pairs(query, reference)
    chosen = node_weights(name).shortlist(query, reference.at(candidates))
    for got, all_of_them in zip(chosen, every, strict=True):
        torch.testing.assert_close(got, all_of_them[torch.arange(3).unsqueeze(1), candidates])


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0, 1e5])
def test_relative_floor_is_free_of_scale(scale, generator):
    query = torch.randn(2, 5, 8, generator=generator)
    reference = torch.randn(2, 6, 8, generator=generator)
    expected = cross_reference_weights(query, reference)
    scaled = cross_reference_weights(query * scale, reference / scale**0.5)
    for got, want in zip(scaled, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_absolute_floor_is_not(generator):
    query = torch.randn(2, 5, 8, generator=generator)
    supply, _ = cross_reference_weights(query, query, floor_scale="absolute")
    scaled, _ = cross_reference_weights(query * 0.01, query * 0.01, floor_scale="absolute")
    assert (scaled - supply).abs().max() > 0.01


def test_all_negative_relevance_becomes_uniform():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    supply, demand = cross_reference_weights(query, -query, floor=0.0)
    torch.testing.assert_close(supply, torch.full((2,), 0.5))
    torch.testing.assert_close(demand, torch.full((2,), 0.5))


def test_zero_sets_stay_finite():
    for part in cross_reference_weights(torch.zeros(3, 4), torch.zeros(2, 4)):
        torch.testing.assert_close(part, torch.full_like(part, 1 / len(part)))


def test_normalize_weights_to_a_total():
    weights = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(
        normalize_weights(weights, total=2.0), torch.tensor([[0.5, 1.5], [1.0, 1.0]])
    )


def test_gradient(generator):
    query = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cross_reference_weights, (query, reference))


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="weights: expected one of"):
        node_weights("attention")
    with pytest.raises(ValueError, match=r"^floor: expected zero or more, got -1"):
        node_weights("cross_reference", floor=-1)
    with pytest.raises(ValueError, match=r"^floor_scale: expected one of relative, absolute"):
        node_weights("cross_reference", floor_scale="logarithmic")
