"""Packed sets: ``[B, N * D]`` for libraries that take 2-D embeddings, ``[B, N, D]`` inside."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from emd_retrieval._checks import check_positive, check_tensor


def pack(sets: Tensor) -> Tensor:
    """Pack sets of local features for PML, FAISS or a ``.npy`` file.

    Shape:
        ``[B, N, D]`` to ``[B, N * D]``, node after node.

    Raises:
        TypeError: If ``sets`` is not a floating-point tensor.
        ValueError: If it is not 3-D.

    Example:
        >>> import torch
        >>> pack(torch.arange(6.0).view(1, 3, 2))
        tensor([[0., 1., 2., 3., 4., 5.]])
    """
    check_tensor("sets", sets, ["B", "N", "D"])
    return sets.flatten(1)


def unpack(packed: Tensor, channels: int, *, name: str = "packed") -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: Shape: ``[B, N * D]``.
        channels: D, the channels of a node.
        name: What to call the argument in an error.

    Returns:
        A view. Shape: ``[B, N, D]``.

    Raises:
        TypeError: If ``packed`` is not a floating-point tensor.
        ValueError: If it is not 2-D, or its width is not a multiple of ``channels``.

    Example:
        >>> import torch
        >>> unpack(torch.zeros(4, 14 * 128), 128).shape
        torch.Size([4, 14, 128])
    """
    check_positive("channels", channels)
    check_tensor(name, packed, ["B", "N*D"])
    width = packed.shape[1]
    if width < channels or width % channels:
        raise ValueError(
            f"{name}: expected a packed set whose width is a multiple of channels = {channels}, "
            f"got shape {list(packed.shape)}"
        )
    return packed.view(packed.shape[0], width // channels, channels)


def global_vectors(sets: Tensor, global_node: int | None = None) -> Tensor:
    """The global vector of each set, of unit norm: what a first-stage index is built on.

    It is the node ``global_node`` where the pyramid has a 1x1 level (the pooled feature), else the
    mean of the normalised nodes. Either way it depends on directions only, so scaling a set changes
    nothing.

    Args:
        sets: Shape: ``[B, N, D]``.
        global_node: Index of the 1x1 node, for instance ``-1`` for the pyramid (3, 2, 1).

    Returns:
        Unit vectors. Shape: ``[B, D]``.

    Raises:
        TypeError: If ``sets`` is not a floating-point tensor.
        ValueError: If it is not 3-D, or has no such node.
    """
    nodes = check_tensor("sets", sets, ["B", "N", "D"])["N"]
    if global_node is None:
        return F.normalize(F.normalize(sets, dim=-1).mean(dim=1), dim=-1)
    if not -nodes <= global_node < nodes:
        raise ValueError(f"global_node: expected a node of {nodes}, got {global_node}")
    return F.normalize(sets[:, global_node], dim=-1)
