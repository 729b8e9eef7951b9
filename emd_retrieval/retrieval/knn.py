"""The k nearest neighbours by EMD, under the protocol of PML's ``FaissKNN``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emd_retrieval._checks import check_finite, check_positive, check_tensor
from emd_retrieval._files import whole_file
from emd_retrieval.features.packing import global_vectors, pack, unpack
from emd_retrieval.matching import EMDMatcher, PreparedSets
from emd_retrieval.retrieval.ranking import Ranking, rank_by
from emd_retrieval.retrieval.shortlist import FaissShortlist
from emd_retrieval.retrieval.store import LocalFeatureStore


def search_sets(
    query: Tensor | PreparedSets,
    gallery: Tensor | PreparedSets,
    k: int,
    *,
    matcher: EMDMatcher,
    shortlist: int | None,
    index: FaissShortlist | None = None,
    global_node: int | None = None,
    exclude: Tensor | None = None,
) -> Ranking:
    """Rank gallery sets for each query set: shortlist, EMD re-ranking, the tail as it was.

    Args:
        query: Shape: ``[Q, N, D]``.
        gallery: Shape: ``[R, M, D]``. Prepare it once (:meth:`EMDMatcher.prepare`) and pass
            ``index`` where queries come a few at a time; the very object ``query`` searches the
            queries among themselves.
        k: Depth of the answer.
        matcher: The EMD similarity.
        shortlist: How many candidates of the first stage are compared by EMD; ``None`` compares
            all.
        index: The first stage over the gallery; made from ``gallery`` if not given.
        global_node: Where the global vector is, see :func:`emd_retrieval.features.global_vectors`.
        exclude: A gallery row to leave out for each query. Shape: ``[Q]``.

    Returns:
        A ranking of depth ``k``. Beyond the shortlist it keeps the first stage's order.
    """
    if shortlist is None:
        return rank_by(matcher.all_pairs(query, gallery), k, exclude=exclude)
    if index is None:
        index = FaissShortlist(global_vectors(_nodes(gallery), global_node))
    most = len(gallery) - (exclude is not None)
    vectors = global_vectors(_nodes(query), global_node)
    first = index.search(vectors, min(most, max(k, shortlist)), exclude=exclude)
    scores = matcher.shortlist(query, gallery, first.rows[:, :shortlist])
    return first.reordered(scores).top(k)


def _nodes(sets: Tensor | PreparedSets) -> Tensor:
    return sets.nodes if isinstance(sets, PreparedSets) else sets


class EMDKNN:
    """Nearest neighbours by EMD: ``knn_func=`` of PML's ``AccuracyCalculator`` or a model.

    Only packed sets pass through PML, so the first stage's global vector is a function of the set:
    the node ``global_node`` (the 1x1 level of a pyramid) or the mean of the normalised nodes.

    Args:
        channels: D, the channels of a node.
        shortlist: How many candidates the first stage hands to the EMD; ``None`` compares all
            pairs.
        matcher: The EMD similarity; the paper's by default.
        global_node: Index of the global node, for instance ``-1`` for the pyramid (3, 2, 1).
        reset_before: Forget the reference sets before a call that brings its own.
        reset_after: Forget them after a call. Both as in ``FaissKNN``; pass ``False`` for use in
            ``InferenceModel``, or call :meth:`train` first.

    Example:
        >>> from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        >>> calculator = AccuracyCalculator(k="max_bin_count", knn_func=EMDKNN(channels=8))
        >>> sets = torch.randn(6, 5 * 8, generator=torch.Generator().manual_seed(0))
        >>> metrics = calculator.get_accuracy(sets, torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> sorted(metrics)[-2:]
        ['precision_at_1', 'r_precision']
    """

    def __init__(
        self,
        channels: int,
        shortlist: int | None = 100,
        *,
        matcher: EMDMatcher | None = None,
        global_node: int | None = None,
        reset_before: bool = True,
        reset_after: bool = True,
    ) -> None:
        check_positive("channels", channels)
        if shortlist is not None:
            check_positive("shortlist", shortlist)
        self.channels = channels
        self.shortlist = shortlist
        self.matcher = EMDMatcher() if matcher is None else matcher
        self.global_node = global_node
        self.reset_before = reset_before
        self.reset_after = reset_after
        self._sets: Tensor | None = None
        self._prepared: PreparedSets | None = None
        self._index: FaissShortlist | None = None

    @staticmethod
    def from_store(
        store: LocalFeatureStore,
        shortlist: int | None = 100,
        *,
        matcher: EMDMatcher | None = None,
        global_node: int | None = None,
    ) -> EMDKNN:
        """Search the sets of a store, decoded into memory; rows are positions in the store.

        For galleries that fit there; :class:`EMDReranker` reads the candidates' rows alone.

        Args:
            store: Sets of one number of nodes.
            shortlist: As for the constructor.
            matcher: As for the constructor.
            global_node: As for the constructor.

        Raises:
            ValueError: If the number of nodes varies from set to set, or the store is empty.
        """
        if store.manifest.nodes is None or not len(store):
            what = "is empty" if not len(store) else "has sets of different numbers of nodes"
            raise ValueError(f"store: {store.path.name} {what}; EMDKNN needs sets of one size")
        knn = EMDKNN(
            store.manifest.channels,
            shortlist,
            matcher=matcher,
            global_node=global_node,
            reset_after=False,
        )
        knn.train(pack(store.nodes()))
        return knn

    def __call__(
        self,
        query: Tensor,
        k: int,
        reference: Tensor | None = None,
        ref_includes_query: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest reference sets of each query set.

        Args:
            query: Packed sets. Shape: ``[Q, N * D]``.
            k: How many neighbours.
            reference: Packed sets to search, besides those added before. Shape: ``[R, M * D]``.
            ref_includes_query: The first Q references are the queries; each leaves itself out.

        Returns:
            Distances (``1 - similarity``; infinite where only the first stage ranked) ``[Q, k]``
            and reference rows ``[Q, k]``, nearest first.

        Raises:
            ValueError: If there is nothing to search, or shapes or ``k`` do not fit.
        """
        if reference is not None:
            if self.reset_before:
                self.reset()
            self._append(reference, "reference")
        if self._sets is None:
            raise ValueError(
                "reference: there is nothing to search; pass reference=, or call train() first "
                "(reset_after=True forgets the sets after each call)"
            )
        sets = unpack(query.detach().float().cpu(), self.channels, name="query")
        check_finite("query", sets)
        exclude = torch.arange(len(sets)) if ref_includes_query else None
        most = len(self._sets) - (exclude is not None)
        if not 1 <= k <= most:
            raise ValueError(f"k: expected 1 to {most} (the reference sets), got {k}")
        if self.shortlist is not None and self._index is None:
            self._index = FaissShortlist(global_vectors(self._sets, self.global_node))
        if self._prepared is None:
            self._prepared = self.matcher.prepare(self._sets)
        same = ref_includes_query and torch.equal(sets, self._sets)
        ranking = search_sets(
            self._prepared if same else sets,
            self._prepared,
            k,
            matcher=self.matcher,
            shortlist=self.shortlist,
            index=self._index,
            global_node=self.global_node,
            exclude=exclude,
        )
        if self.reset_after:
            self.reset()
        return (1 - ranking.scores).to(query.device), ranking.rows.to(query.device)

    def train(self, embeddings: Tensor) -> None:
        """Forget what was there and add packed sets. Shape: ``[R, M * D]``."""
        self.reset()
        self.add(embeddings)

    def add(self, embeddings: Tensor) -> None:
        """Add packed sets of the same number of nodes. Shape: ``[R, M * D]``."""
        self._append(embeddings, "embeddings")

    def _append(self, embeddings: Tensor, name: str) -> None:
        embeddings = torch.as_tensor(embeddings).detach().float().cpu()
        sets = unpack(embeddings, self.channels, name=name)
        check_finite(name, sets)
        if self._sets is not None:
            check_tensor(name, sets, ["R", self._sets.shape[1], self.channels])
            sets = torch.cat([self._sets, sets])
        self.reset()
        self._sets = sets.contiguous()

    def reset(self) -> None:
        """Forget the reference sets."""
        self._sets = self._prepared = self._index = None

    def save(self, filename: str | Path) -> None:
        """Write the reference sets to a file (safetensors), whole or not at all."""
        if self._sets is None:
            raise ValueError("reference: there are no sets to save; call train() first")
        with whole_file(filename) as partial:
            save_file({"sets": self._sets}, partial)

    def load(self, filename: str | Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is not one, or holds sets of other channels.
        """
        try:
            with safe_open(str(filename), framework="pt") as file:
                sets: Tensor = file.get_tensor("sets")
        except SafetensorError as error:
            raise ValueError(
                f"filename: {str(filename)!r} holds no saved sets ({error})"
            ) from error
        check_tensor("sets", sets, ["R", "M", self.channels])
        self.reset()
        self._sets = sets
