"""What several tests build their inputs with."""

from __future__ import annotations

import torch


def structured_sets(
    count: int, nodes: int, channels: int, generator: torch.Generator, parts: int = 6
) -> torch.Tensor:
    """Sets that share parts, as feature maps of real images do: ``[count, nodes, channels]``."""
    vocabulary = torch.randn(parts, channels, generator=generator)
    chosen = torch.randint(parts, (count, nodes), generator=generator)
    noise = torch.randn(count, nodes, channels, generator=generator)
    return vocabulary[chosen] + 0.4 * noise
