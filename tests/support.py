"""What several tests build their inputs with."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from emd_retrieval.transport import solve


def structured_sets(
    count: int, nodes: int, channels: int, generator: torch.Generator, parts: int = 6
) -> torch.Tensor:
    """Sets that share parts, as feature maps of real images do: ``[count, nodes, channels]``."""
    vocabulary = torch.randn(parts, channels, generator=generator)
    chosen = torch.randint(parts, (count, nodes), generator=generator)
    noise = torch.randn(count, nodes, channels, generator=generator)
    return vocabulary[chosen] + 0.4 * noise


class SolvedProblems(Dataset[list[torch.Tensor]]):
    """Value and flow of transportation problems, solved in whatever process asks for them."""

    def __init__(self, problems: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        self.problems = problems

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        plan = solve(*self.problems[number])
        return [plan.value, plan.flow]
