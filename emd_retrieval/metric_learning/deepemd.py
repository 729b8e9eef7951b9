"""DeepEMD as a pytorch-metric-learning distance: ``distance=`` in a loss, a miner or a tester."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from emd_retrieval.features.packing import unpack
from emd_retrieval.matching import EMDMatcher


class _PackedSetDistance(BaseDistance):
    """What the similarity and the distance form share: packed sets in, a matrix of pairs out."""

    def __init__(
        self, channels: int, matcher: EMDMatcher | None = None, *, is_inverted: bool, **kwargs: Any
    ) -> None:
        # PML would normalise a packed set as one vector; nodes are normalised by the ground cost.
        super().__init__(normalize_embeddings=False, is_inverted=is_inverted, **kwargs)
        if channels < 1:
            raise ValueError(f"channels: expected 1 or more, got {channels}")
        self.channels = channels
        self.matcher = EMDMatcher() if matcher is None else matcher
        self.add_to_recordable_attributes(list_of_names=["channels"], is_stat=False)

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """The matrix of pairs. Shape: ``[Q, N * D], [R, M * D] -> [Q, R]``."""
        # Losses and miners hand the embeddings themselves as reference; saying "none" instead lets
        # the matcher solve each pair once.
        mat: Tensor = super().forward(query_emb, None if ref_emb is query_emb else ref_emb)
        return mat

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """All pairs. Shape: ``[Q, N * D], [R, M * D] -> [Q, R]``."""
        query = unpack(query_emb, self.channels, name="query_emb")
        if ref_emb is query_emb:
            return self._oriented(self.matcher.all_pairs(query))
        return self._oriented(
            self.matcher.all_pairs(query, unpack(ref_emb, self.channels, name="ref_emb"))
        )

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """Matching rows. Shape: ``[B, N * D], [B, M * D] -> [B]``."""
        return self._oriented(
            self.matcher.paired(
                unpack(query_emb, self.channels, name="query_emb"),
                unpack(ref_emb, self.channels, name="ref_emb"),
            )
        )

    def _oriented(self, similarity: Tensor) -> Tensor:
        raise NotImplementedError


class DeepEMDSimilarity(_PackedSetDistance):
    """The DeepEMD similarity (Equation 3 over the mass), for losses that take similarities.

    In [-1, 1] under cosine costs, 1 for a set with itself; ``is_inverted`` as PML's cosine
    similarity. Differentiable in costs and node weights by the exact duals of the transport
    problem.

    Args:
        channels: D, the channels of a node. Embeddings are packed sets ``[B, N * D]``; sets of
            different N can meet.
        matcher: Ground cost, node weights and solver; the paper's by default.
        **kwargs: Passed on to PML's ``BaseDistance`` (``power``, ``collect_stats``).

    Raises:
        ValueError: If ``channels`` is not positive; when called, if a width is not a multiple of
            it.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import MultiSimilarityLoss
        >>> loss = MultiSimilarityLoss(distance=DeepEMDSimilarity(channels=8))
        >>> embeddings = torch.randn(4, 14 * 8, requires_grad=True)
        >>> loss(embeddings, torch.tensor([0, 0, 1, 1])).backward()
        >>> embeddings.grad.shape
        torch.Size([4, 112])
    """

    def __init__(self, channels: int, matcher: EMDMatcher | None = None, **kwargs: Any) -> None:
        super().__init__(channels, matcher, is_inverted=True, **kwargs)

    def _oriented(self, similarity: Tensor) -> Tensor:
        return similarity


class DeepEMDDistance(_PackedSetDistance):
    """The DeepEMD distance, ``1 - similarity``, for losses and miners that take distances.

    In [0, 2] under cosine costs, 0 for a set with itself. Arguments as :class:`DeepEMDSimilarity`.
    """

    def __init__(self, channels: int, matcher: EMDMatcher | None = None, **kwargs: Any) -> None:
        super().__init__(channels, matcher, is_inverted=False, **kwargs)

    def _oriented(self, similarity: Tensor) -> Tensor:
        return 1 - similarity
