import pytest
import torch
import torch.nn.functional as F

from emd_retrieval.features import global_vectors, pack, unpack


def test_round_trip(generator):
    sets = torch.randn(3, 14, 8, generator=generator)
    packed = pack(sets)
    assert packed.shape == (3, 112)
    assert torch.equal(unpack(packed, 8), sets)
    assert torch.equal(packed[1, 8:16], sets[1, 1]), "node after node"


def test_unpack_takes_columns_of_a_wider_matrix(generator):
    wide = torch.randn(3, 20, generator=generator)
    assert torch.equal(unpack(wide[:, 2:14], 4), wide[:, 2:14].reshape(3, 3, 4))


def test_gradients_pass(generator):
    sets = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
    unpack(pack(sets), 4).sum().backward()
    assert torch.equal(sets.grad, torch.ones_like(sets))


@pytest.mark.parametrize("channels", [5, 13])
def test_unpack_names_width_and_channels(channels):
    with pytest.raises(ValueError) as caught:
        unpack(torch.zeros(3, 12), channels, name="query_emb")
    assert str(caught.value) == (
        "query_emb: expected a packed set whose width is a multiple of "
        f"channels = {channels}, got shape [3, 12]"
    )


@pytest.mark.parametrize("channels", [0, -4])
def test_unpack_takes_a_positive_number_of_channels(channels):
    with pytest.raises(ValueError, match=f"^channels: expected a positive number, got {channels}$"):
        unpack(torch.zeros(3, 12), channels, name="query_emb")


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"sets: expected shape \[B, N, D\], got \[3, 12\]"):
        pack(torch.zeros(3, 12))
    with pytest.raises(ValueError, match=r"packed: expected shape \[B, N\*D\], got \[3, 4, 3\]"):
        unpack(torch.zeros(3, 4, 3), 3)
    with pytest.raises(TypeError, match="packed: expected a floating-point tensor"):
        unpack(torch.zeros(3, 12, dtype=torch.int64), 3)
    with pytest.raises(TypeError, match=r"sets: expected a torch.Tensor, got list"):
        pack([[1.0]])


def test_global_vector_is_the_global_node(generator):
    sets = torch.randn(3, 14, 8, generator=generator)
    for node in (-1, 13):
        torch.testing.assert_close(global_vectors(sets, node), F.normalize(sets[:, 13], dim=1))


def test_global_vector_is_the_mean_of_normalised_nodes(generator):
    sets = torch.randn(3, 5, 8, generator=generator)
    vectors = global_vectors(sets)
    for row, nodes in zip(vectors, sets, strict=True):
        mean = sum(node / node.norm() for node in nodes)
        torch.testing.assert_close(row, mean / mean.norm())


@pytest.mark.parametrize("node", [None, 0])
def test_global_vector_is_free_of_scale(node, generator):
    """PML's testers L2-normalise packed sets; the first stage must not notice."""
    sets = torch.randn(3, 5, 8, generator=generator)
    torch.testing.assert_close(
        global_vectors(unpack(F.normalize(pack(sets)), 8), node), global_vectors(sets, node)
    )


@pytest.mark.parametrize("node", [5, -6])
def test_global_node_out_of_range(node):
    with pytest.raises(ValueError, match=f"global_node: expected a node of 5, got {node}"):
        global_vectors(torch.zeros(3, 5, 8), node)
