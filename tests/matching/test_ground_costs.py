import pytest
import torch
from pytorch_metric_learning.distances import SNRDistance

from emd_retrieval.matching import ground_cost


def plain_cosine_cost(query, reference, centered):
    """Equation 2 in plain loops."""
    cost = torch.empty(len(query), len(reference), dtype=query.dtype)
    for i, u in enumerate(query):
        for j, v in enumerate(reference):
            if centered:
                u_, v_ = u - u.mean(), v - v.mean()
            else:
                u_, v_ = u, v
            cost[i, j] = 1 - (u_ @ v_) / (u_.norm() * v_.norm())
    return cost


@pytest.mark.parametrize("name", ["cosine", "centered_cosine"])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 7), (1, 4)])
def test_matches_the_equation(name, n, m, generator):
    query = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    reference = torch.randn(m, 6, generator=generator, dtype=torch.float64)
    expected = plain_cosine_cost(query, reference, centered=name == "centered_cosine")
    torch.testing.assert_close(ground_cost(name)(query, reference), expected)


def test_leading_dimensions_agree_with_a_loop(generator):
    query = torch.randn(2, 3, 4, 6, generator=generator)
    reference = torch.randn(2, 3, 5, 6, generator=generator)
    cost = ground_cost("cosine")(query, reference)
    assert cost.shape == (2, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            single = ground_cost("cosine")(query[i, j], reference[i, j])
            torch.testing.assert_close(cost[i, j], single)


def test_centering_removes_a_constant_per_node(generator):
    query = torch.randn(4, 6, generator=generator)
    reference = torch.randn(4, 6, generator=generator)
    cost = ground_cost("centered_cosine")
    shift = torch.randn(4, 1, generator=generator)
    torch.testing.assert_close(cost(query + shift, reference), cost(query, reference))


def test_range_and_zero_vectors(generator):
    nodes = torch.randn(6, 8, generator=generator)
    nodes[2] = 0
    cost = ground_cost("cosine")(nodes, nodes)
    assert cost.min() >= -1e-6
    assert cost.max() <= 2 + 1e-6
    assert torch.equal(cost[2], torch.ones(6)), "cosine with a zero vector counts as 0"


@pytest.mark.parametrize("name", ["cosine", "centered_cosine", "snr"])
def test_gradient(name, generator):
    query = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ground_cost(name), (query, reference))


@pytest.mark.parametrize(("n", "m", "scale"), [(5, 5, 1.0), (3, 7, 1e4), (1, 4, 1e-4)])
def test_snr_is_the_distance_of_pml(n, m, scale, generator):
    query = scale * torch.randn(n, 6, generator=generator)
    reference = torch.randn(m, 6, generator=generator)
    cost = ground_cost("snr")(query, reference)
    torch.testing.assert_close(cost, SNRDistance()(query, reference), rtol=1e-5, atol=1e-5)
    expected = torch.empty(n, m)
    for i in range(n):
        for j in range(m):
            u, v = query[i] / query[i].norm(), reference[j] / reference[j].norm()
            expected[i, j] = (u - v).var() / u.var()
    torch.testing.assert_close(cost, expected, rtol=1e-5, atol=1e-5)
    assert not ground_cost("snr").symmetric


def test_snr_is_finite_without_signal(generator):
    nodes = torch.randn(4, 6, generator=generator)
    nodes[1], nodes[2] = 0, 3.7
    nodes.requires_grad_()
    cost = ground_cost("snr")(nodes, nodes)
    torch.testing.assert_close(cost[1:3], torch.ones(2, 4))
    cost.sum().backward()
    assert torch.isfinite(nodes.grad).all()


@pytest.mark.parametrize("name", ["cosine", "centered_cosine", "snr"])
def test_gradient_of_zero_nodes_is_zero(name, generator):
    nodes = torch.randn(3, 5, generator=generator)
    nodes[1] = 0
    nodes.requires_grad_()
    ground_cost(name)(nodes, nodes.detach()).sum().backward()
    assert torch.isfinite(nodes.grad).all()
    assert not nodes.grad[1].any()


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"ground_cost: expected one of .*did you mean 'cosine'"):
        ground_cost("cosin")
    with pytest.raises(ValueError, match=r"reference: expected shape \[..., M, D\], with D = 4"):
        ground_cost("cosine")(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(TypeError, match="query: expected a floating-point tensor"):
        ground_cost("cosine")(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4))
