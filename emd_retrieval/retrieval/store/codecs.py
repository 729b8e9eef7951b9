"""How the nodes of a store become bytes and float32 again: float32, float16, int8 with scales.

A node is ``D`` codes; under int8 its scale goes before them. Nothing here knows files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CODES = {"float32": "<f4", "float16": "<f2", "int8": "i1"}
CODECS = tuple(_CODES)
_FLOAT16_MAX = 65504.0
_INT8_MAX = 127


@dataclass(frozen=True)
class EncodedSets:
    """Sets as the store holds them, for those who decode in their own loop.

    Attributes:
        codes: Shape: ``[n, N, D]``; float32, float16 or int8. Padding nodes are zero.
        scales: What the codes of each node are multiplied by, for int8; else ``None``.
            Shape: ``[n, N]``, float32.
        counts: Nodes of each set before the padding. Shape: ``[n]``, int64.
    """

    codes: Tensor
    scales: Tensor | None
    counts: Tensor

    def decode(self) -> Tensor:
        """The sets as float32. Shape: ``[n, N, D]``."""
        nodes = self.codes.float()
        return nodes if self.scales is None else nodes.mul_(self.scales.unsqueeze(2))


def node_bytes(codec: str, channels: int) -> int:
    """Bytes of one stored node."""
    return _node_dtype(codec, channels).itemsize


def encode(nodes: NDArray[np.float32], codec: str) -> NDArray[np.uint8]:
    """Nodes as bytes.

    Error of a value x after decoding: none with float32; at most ``|x| / 2048`` with float16 (and
    2**-25 for values below 6e-5); at most half a step with int8, where a node's step is its largest
    ``|x|`` over 127.

    Args:
        nodes: Finite values.
        codec: One of :data:`CODECS`.

    Shape:
        ``[m, D]`` to ``[m, node_bytes]``.

    Raises:
        ValueError: If a value is beyond what float16 holds, 65504.
    """
    encoded = np.zeros(len(nodes), _node_dtype(codec, nodes.shape[1]))
    if codec == "int8":
        largest = np.abs(nodes).max(axis=1)
        # Scales below the smallest normal float32 would lose the codes' last bits.
        scales = np.where(largest > 1e-35, largest / np.float32(_INT8_MAX), np.float32(0))
        steps = np.where(scales > 0, scales, np.float32(1))[:, None]
        codes = np.rint(nodes / steps)
        encoded["codes"] = np.where(scales[:, None] > 0, codes, 0).clip(-_INT8_MAX, _INT8_MAX)
        encoded["scale"] = scales
    else:
        if codec == "float16" and nodes.size and float(np.abs(nodes).max()) > _FLOAT16_MAX:
            raise ValueError(
                f"nodes: float16 holds values up to {_FLOAT16_MAX:g}, got "
                f"{float(np.abs(nodes).max()):g}; use codec='float32' or 'int8'"
            )
        encoded["codes"] = nodes
    return encoded.view(np.uint8).reshape(len(nodes), encoded.dtype.itemsize)


def split(
    encoded: NDArray[np.uint8], codec: str, channels: int
) -> tuple[NDArray[np.generic], NDArray[np.float32] | None]:
    """Codes and scales of nodes that were read back.

    Shape:
        ``[n, N, node_bytes]`` to ``[n, N, D]`` and ``[n, N]``.
    """
    fields = np.ascontiguousarray(encoded).view(_node_dtype(codec, channels))[..., 0]
    codes = np.ascontiguousarray(fields["codes"])
    return codes, np.ascontiguousarray(fields["scale"]) if codec == "int8" else None


def to_tensors(
    codes: NDArray[np.generic], scales: NDArray[np.float32] | None, counts: NDArray[np.int64]
) -> EncodedSets:
    """Wrap arrays that nobody else holds, without a copy."""
    return EncodedSets(
        torch.from_numpy(codes),
        None if scales is None else torch.from_numpy(scales),
        torch.from_numpy(counts),
    )


def _node_dtype(codec: str, channels: int) -> np.dtype[np.void]:
    scale = [("scale", "<f4")] if codec == "int8" else []
    return np.dtype([*scale, ("codes", _CODES[codec], (channels,))])
