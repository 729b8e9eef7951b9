"""Gradients of nodes from sparse flows: what the matrix product of the dense flows gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from emd_retrieval.transport import _native
from emd_retrieval.transport.simplex import add_flow_products


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sparse_flows(pairs: int, N: int, M: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(N * M)
    dense = torch.rand(pairs, N, M, generator=generator, dtype=dtype)
    return dense * (torch.rand(pairs, N, M, generator=generator) < 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("Q", "R", "N", "M", "D"),
    [(3, 5, 4, 6, 7), (1, 40, 14, 14, 300), (9, 1, 1, 1, 1), (2, 2, 2, 1500, 3), (2, 2, 40, 60, 5)],
)
def test_every_pair_of_a_grid(
    threads: int, dtype: torch.dtype, Q: int, R: int, N: int, M: int, D: int
) -> None:
    flow = sparse_flows(Q * R, N, M, dtype)
    scale = torch.randn(Q * R, dtype=dtype)
    scale[0] = 0
    left, right = torch.randn(Q, N, D, dtype=dtype), torch.randn(R, M, D, dtype=dtype)
    to_left, to_right = torch.ones_like(left), torch.ones_like(right)
    add_flow_products(
        flow, scale, left, right, left_gradient=to_left, right_gradient=to_right, upper=False
    )
    moved = (flow * scale[:, None, None]).view(Q, R, N, M)
    expected_left = 1 + torch.einsum("qrnm,rmd->qnd", moved, right)
    expected_right = 1 + torch.einsum("qrnm,qnd->rmd", moved, left)
    torch.testing.assert_close(to_left, expected_left, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(to_right, expected_right, rtol=1e-5, atol=1e-4)
    alone = torch.ones_like(right)
    add_flow_products(
        flow, scale, left, right, left_gradient=None, right_gradient=alone, upper=False
    )
    assert torch.equal(alone, to_right)


def upper_gradient(flow: Tensor, scale: Tensor, sets: Tensor) -> Tensor:
    gradient = torch.zeros_like(sets)
    add_flow_products(
        flow, scale, sets, sets, left_gradient=gradient, right_gradient=gradient, upper=True
    )
    return gradient


def test_the_upper_half_of_a_square(threads: int) -> None:
    Q, N, D = 6, 5, 200
    first, second = torch.triu_indices(Q, Q)
    flow, scale = sparse_flows(len(first), N, N, torch.float32), torch.randn(len(first))
    sets = torch.randn(Q, N, D)
    moved = torch.zeros(Q, Q, N, N)
    moved[first, second] = flow * scale[:, None, None]
    expected = torch.einsum("qrnm,rmd->qnd", moved, sets)
    expected += torch.einsum("qrnm,qnd->rmd", moved, sets)
    gradient = upper_gradient(flow, scale, sets)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)
    torch.set_num_threads(1)
    assert torch.equal(upper_gradient(flow, scale, sets), gradient)


def test_sizes_that_do_not_fit() -> None:
    flow, scale, sets = (torch.ones(shape).numpy() for shape in ((4, 3, 3), (4,), (2, 3, 5)))
    with pytest.raises(ValueError, match="sizes do not fit"):
        _native.add_flow_products(flow, scale[:3], sets, sets, sets, None, False, 1)
    with pytest.raises(ValueError, match="sizes do not fit"):
        _native.add_flow_products(flow, scale, sets, sets, sets, None, True, 1)
    with pytest.raises(ValueError, match="left_gradient: wrong size"):
        _native.add_flow_products(flow, scale, sets, sets, sets[:1], None, False, 1)
