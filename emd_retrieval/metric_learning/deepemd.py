"""DeepEMD as a pytorch-metric-learning distance: ``distance=`` in a loss, a miner or a tester."""

from __future__ import annotations

from typing import Any, cast

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, SNRDistance
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from emd_retrieval.features.packing import unpack
from emd_retrieval.matching import EMDMatcher, PairPlans


class _KeptPlans:
    """What a miner solved, for the loss that asks for the same matrix next, with gradients.

    Known by the very tensors and their versions, never by content; gone with the tensors, with the
    next batch, and in copies and pickles.
    """

    def __init__(self) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[_KeptPlans], tuple[()]]:
        return _KeptPlans, ()

    def plans_for(self, query: Tensor, reference: Tensor, matcher: EMDMatcher) -> PairPlans | None:
        """Plans of these sets: kept ones, empty ones to keep, or ``None`` where none are of use."""
        if query.is_inference() or reference.is_inference():
            return None
        if not (query.requires_grad or reference.requires_grad):
            return None
        key = query._version, reference._version, matcher
        found = self._of.get(query)
        if found is not None:
            known, other, plans = found
            if known == key and other() is reference:
                return cast(PairPlans, plans)
        if torch.is_grad_enabled():
            return None
        # Tensors that will want gradients, in a call that takes none: a miner before its loss.
        self._of.clear()
        plans = PairPlans()
        self._of[query] = key, TensorWeakRef(reference), plans
        return plans


class _PackedSetDistance(BaseDistance):
    """What the similarity and the distance form share: packed sets in, a matrix of pairs out."""

    def __init__(self, channels: int, matcher: EMDMatcher | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if channels < 1:
            raise ValueError(f"channels: expected 1 or more, got {channels}")
        # PML would normalise a packed set as one vector; nodes are normalised by the ground cost.
        # CosineSimilarity's constructor insists on True, hence the change after it.
        self.normalize_embeddings = False
        self.channels = channels
        self.matcher = EMDMatcher() if matcher is None else matcher
        self.add_to_recordable_attributes(list_of_names=["channels"], is_stat=False)
        self._kept = _KeptPlans()

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """The matrix of pairs. Shape: ``[Q, N * D], [R, M * D] -> [Q, R]``."""
        # Losses and miners hand the embeddings themselves as reference; saying "none" instead lets
        # the matcher solve each pair once.
        mat: Tensor = super().forward(query_emb, None if ref_emb is query_emb else ref_emb)
        return mat

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """All pairs. Shape: ``[Q, N * D], [R, M * D] -> [Q, R]``."""
        query = unpack(query_emb, self.channels, name="query_emb")
        reference = None
        if ref_emb is not query_emb:
            reference = unpack(ref_emb, self.channels, name="ref_emb")
        plans = self._kept.plans_for(query_emb, ref_emb, self.matcher)
        if plans is None:
            return self._oriented(self.matcher.all_pairs(query, reference))
        return self._oriented(self.matcher.all_pairs(query, reference, plans=plans))

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


class DeepEMDSimilarity(_PackedSetDistance, CosineSimilarity):
    """The DeepEMD similarity (Equation 3 over the mass), for losses that take similarities.

    In [-1, 1] under cosine costs, 1 for a set with itself; ``is_inverted`` as PML's cosine
    similarity, in whose place it stands (losses such as ArcFace check for it). Differentiable in
    costs and node weights by the exact duals of the transport problem.

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
        super().__init__(channels, matcher, **kwargs)

    def _oriented(self, similarity: Tensor) -> Tensor:
        return similarity


class DeepEMDDistance(_PackedSetDistance):
    """The DeepEMD distance, ``1 - similarity``, for losses and miners that take distances.

    In [0, 2] under cosine costs, 0 for a set with itself. Arguments as :class:`DeepEMDSimilarity`.
    """

    def __init__(self, channels: int, matcher: EMDMatcher | None = None, **kwargs: Any) -> None:
        super().__init__(channels, matcher, **kwargs)

    def _oriented(self, similarity: Tensor) -> Tensor:
        return 1 - similarity


class DeepEMDSNRDistance(_PackedSetDistance, SNRDistance):
    """An EMD whose ground cost is the SNR distance between nodes, for PML's SNR losses.

    Zero for a set with itself, unbounded, and not symmetric: the query is the anchor, whose
    variance is the signal.

    Args:
        channels: As for :class:`DeepEMDSimilarity`.
        matcher: Must have ``ground_cost="snr"``; made so where it is not given.
        **kwargs: Passed on to PML's ``BaseDistance`` (``power``, ``collect_stats``).

    Raises:
        ValueError: If ``channels`` is not positive, or the matcher has another ground cost.
    """

    def __init__(self, channels: int, matcher: EMDMatcher | None = None, **kwargs: Any) -> None:
        if matcher is None:
            matcher = EMDMatcher(ground_cost="snr")
        elif matcher.ground_cost != "snr":
            raise ValueError(
                f"matcher: expected ground_cost='snr', got {matcher.ground_cost!r} "
                "(the losses on this distance are defined by signal-to-noise ratios)"
            )
        super().__init__(channels, matcher, **kwargs)

    def _oriented(self, similarity: Tensor) -> Tensor:
        return 1 - similarity
