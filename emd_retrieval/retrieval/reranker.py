"""Re-ranking: the candidates of any first stage in the order of their EMD, from a feature store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_positive, check_tensor
from emd_retrieval.features.packing import unpack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.progress import progress
from emd_retrieval.retrieval.candidates import (
    ABSENT,
    Ids,
    IdsLike,
    as_ids,
    as_scores,
    ids_of,
    rows_of,
)
from emd_retrieval.retrieval.problems import (
    Nearest,
    Problems,
    build_problems,
    build_problems_from_files,
    decoded,
    has_problems,
    is_native,
    nearest_from_files,
)
from emd_retrieval.retrieval.store import LocalFeatureStore
from emd_retrieval.transport import solve, solve_top_k

_EXACT_SOLVERS = ("simplex", "pot")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Reranking:
    """The answer to some queries, the best first; arrays, or tensors for queries that were tensors.

    Attributes:
        ids: Ids of the store (strings as an object array in any case). Where a query had fewer
            candidates than k: -1, or ``None``. Shape: ``[Q, k]``.
        similarities: EMD similarity, ``-inf`` where there is no id. Shape: ``[Q, k]``, float32.
        scores: What decided the order: ``alpha * similarity + (1 - alpha) * candidate score``.
            Shape: ``[Q, k]``, float32.
        flows: Mass between the query's nodes and the answer's, if asked for; zero where there is no
            id. Shape: ``[Q, k, N, M]``.
        compared: How many pairs of query and candidate there were.
        solved: How many of them were solved to the end; bounds proved the others worse.
    """

    ids: Any
    similarities: Any
    scores: Any
    flows: Any
    compared: int
    solved: int

    @property
    def skipped(self) -> float:
        """Share of the pairs that did not have to be solved, from 0 to 1."""
        return 1 - self.solved / self.compared if self.compared else 0.0


class EMDReranker:
    """Orders candidates by the EMD between the query's local features and those of the store.

    Where the solver is exact, most candidates are never solved: a bound proves that they are not
    among the best k. The answer is the same, place by place, as with ``prune=False``.

    Args:
        store: Local features of the gallery; only the candidates' rows are read.
        matcher: The EMD similarity; the paper's by default.
        device: Where costs are computed and problems solved.
        prune: Leave out what bounds prove worse.
        memory_mb: Rough bound on temporary memory, in MiB.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp()
        >>> sets = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> with LocalFeatureStore.create(path, channels=8, nodes=5) as writer:
        ...     writer.append([7, 8, 9], sets)
        >>> reranker = EMDReranker(LocalFeatureStore.open(path))
        >>> reranker.rerank(sets[2:], torch.tensor([[7, 8, 9]]), k=1).ids
        tensor([[9]])
    """

    def __init__(
        self,
        store: LocalFeatureStore,
        matcher: EMDMatcher | None = None,
        *,
        device: str | torch.device = "cpu",
        prune: bool = True,
        memory_mb: float = 64.0,
    ) -> None:
        check_positive("memory_mb", memory_mb)
        self.store = store
        self.matcher = EMDMatcher() if matcher is None else matcher
        self.device = torch.device(device)
        self.prune = prune
        self.memory_mb = memory_mb

    def rerank(
        self,
        query_features: Tensor | NDArray[Any],
        candidate_ids: IdsLike,
        candidate_scores: Tensor | NDArray[Any] | None = None,
        k: int = 10,
        *,
        alpha: float = 1.0,
        return_flows: bool = False,
        description: str | None = None,
    ) -> Reranking:
        """The best ``k`` candidates of each query.

        Args:
            query_features: Local features, as sets or packed. Shape: ``[Q, N, D]`` or
                ``[Q, N * D]``.
            candidate_ids: Ids of the store; -1 (``None`` or an empty string for string ids) fills
                short rows up. Shape: ``[Q, C]``.
            candidate_scores: The first stage's scores, higher is better; read where ``alpha`` is
                below 1. Shape: ``[Q, C]``.
            k: From 1 to C.
            alpha: Share of the EMD in ``alpha * similarity + (1 - alpha) * candidate score``. A
                cosine has the similarity's scale; other scores must be brought to it.
            return_flows: Also give the flows of the answers.
            description: Shows a progress bar under this name.

        Returns:
            Ids, similarities and scores, ordered by score; equal ones in the candidates' order.

        Raises:
            TypeError: If an argument is of the wrong type, or ids of the wrong kind.
            ValueError: If shapes, channels or ``k`` do not fit, a value is not finite, an id is not
                in the store, or a query has one twice.
        """
        queries = self._queries(query_features)
        ids = as_ids("candidate_ids", candidate_ids)
        if len(ids) != len(queries):
            raise ValueError(
                f"candidate_ids: expected a row for each of the {len(queries)} queries, "
                f"got {len(ids)}"
            )
        if not isinstance(k, int | np.integer) or not 1 <= k <= ids.shape[1]:
            raise ValueError(f"k: expected 1 to {ids.shape[1]}, the candidates, got {k}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
        rows = rows_of(self.store, ids)
        extra = self._extra(candidate_scores, rows, alpha)

        places = np.empty((len(queries), k), np.int64)
        similarities = np.empty((len(queries), k), np.float32)
        solved = 0
        for at in self._chunks(queries, ids.shape[1], description):
            part = None if extra is None else extra[at]
            places[at], similarities[at], count = self._best(queries[at], rows[at], part, k, alpha)
            solved += count
        chosen = _at(rows, places)
        absent = chosen == ABSENT
        similarities[absent] = -np.inf
        scores = similarities.copy()
        if extra is not None:
            there = ~absent
            scores[there] = alpha * similarities[there] + (1 - alpha) * _at(extra, places)[there]
        flows = self._flows(queries, chosen) if return_flows else None
        as_tensor = isinstance(query_features, Tensor)
        return Reranking(
            ids=_like(ids_of(self.store, chosen), as_tensor),
            similarities=_like(similarities, as_tensor),
            scores=_like(scores, as_tensor),
            flows=_like(flows, as_tensor),
            compared=int(np.count_nonzero(rows != ABSENT)),
            solved=solved,
        )

    def similarities(
        self,
        query_features: Tensor | NDArray[Any],
        candidate_ids: IdsLike,
        *,
        description: str | None = None,
    ) -> Floats:
        """The EMD similarity of every candidate, none left out.

        Args:
            query_features: As in :meth:`rerank`.
            candidate_ids: As in :meth:`rerank`.
            description: Shows a progress bar under this name.

        Returns:
            Similarities, ``-inf`` for absent candidates. Shape: ``[Q, C]``.

        Raises:
            TypeError: As :meth:`rerank`.
            ValueError: As :meth:`rerank`.
        """
        queries = self._queries(query_features)
        rows = rows_of(self.store, as_ids("candidate_ids", candidate_ids))
        found = np.full(rows.shape, -np.inf, np.float32)
        for at in self._chunks(queries, rows.shape[1], description):
            distance = self._distances(queries[at], rows[at], None)
            found[at] = np.where(rows[at] == ABSENT, -np.inf, 1 - distance)
        return found

    def _queries(self, features: Tensor | NDArray[Any]) -> Tensor:
        if isinstance(features, np.ndarray):
            if features.dtype.kind != "f":
                raise TypeError(f"query_features: expected floating point, got {features.dtype}")
            features = torch.from_numpy(np.require(features, np.float32, ["C", "W"]))
        channels = self.store.manifest.channels
        if isinstance(features, Tensor) and features.ndim == 2:
            features = unpack(features, channels, name="query_features")
        check_tensor("query_features", features, ["Q", "N", channels], finite=True)
        if features.shape[1] == 0:
            raise ValueError("query_features: expected at least one node a set, got none")
        return features.detach().float().to(self.device)

    def _extra(
        self, scores: Tensor | NDArray[Any] | None, rows: NDArray[np.int64], alpha: float
    ) -> Floats | None:
        """The first stage's scores where they count, with zero for absent candidates."""
        if alpha == 1:
            return None
        if scores is None:
            raise ValueError(f"candidate_scores: expected the first stage's, as alpha is {alpha}")
        known = as_scores("candidate_scores", scores, rows.shape)
        known = np.where(rows == ABSENT, np.float32(0), known)
        if not np.isfinite(known).all():
            query, place = np.argwhere(~np.isfinite(known))[0]
            raise ValueError(
                f"candidate_scores: expected finite values, got {known[query, place]} for query "
                f"{query}, candidate {place}"
            )
        return known

    def _chunks(self, queries: Tensor, candidates: int, description: str | None) -> Iterator[slice]:
        nodes, channels = queries.shape[1:]
        stored = self.store.manifest.nodes or 64
        a_query = 4 * candidates * stored * (nodes + channels)
        size = max(1, int(self.memory_mb * 2**20 / max(1, a_query)))
        starts: Iterable[int] = range(0, len(queries), size)
        if description is not None:
            # Even a silent bar takes a tenth of the time of a single query.
            starts = progress(starts, description, unit="chunk")
        for start in starts:
            yield slice(start, min(start + size, len(queries)))

    def _best(
        self, queries: Tensor, rows: NDArray[np.int64], extra: Floats | None, k: int, alpha: float
    ) -> tuple[NDArray[np.int64], Floats, int]:
        """Places of the best k, their similarities, and how many pairs were solved."""
        pairs = int(np.count_nonzero(rows != ABSENT))
        shifts: Floats | None = None
        if extra is not None and alpha > 0:
            # A candidate whose costs are all shifted by a constant has its distance shifted by it:
            # so the mixed score is a distance again, which bounds can prune.
            shifts = (-(1 - alpha) / alpha * extra).astype(np.float32)
        exact = has_problems(self.matcher) and self.matcher.solver in _EXACT_SOLVERS
        if self.prune and exact and alpha > 0 and pairs:
            nearest = self._nearest(queries, rows, shifts, k)
            places, distance = nearest.index, nearest.distance
            pairs = min(pairs, int(nearest.solved.sum()))
        else:
            every = self._distances(queries, rows, shifts)
            order = every if alpha > 0 or extra is None else -extra
            order = np.where(rows == ABSENT, np.inf, order)
            places = np.argsort(order, axis=1, kind="stable")[:, :k]
            distance = _at(every, places)
        if shifts is not None:
            distance = distance - _at(shifts, places)
        return places, 1 - distance, pairs

    def _distances(self, queries: Tensor, rows: NDArray[np.int64], shifts: Floats | None) -> Floats:
        """Distances of all candidates, shifted; what stands for absent ones says nothing."""
        if rows.size == 0 or not (rows != ABSENT).any():
            return np.zeros(rows.shape, np.float32)
        if not has_problems(self.matcher):
            stored, local = self._read(rows)
            distance = self._matcher_distances(queries, decoded(stored, self.device),
                                               stored.counts, local)  # fmt: skip
            return distance if shifts is None else distance + shifts
        return self._solve_all(self._problems(queries, rows, shifts))

    def _problems(
        self, queries: Tensor, rows: NDArray[np.int64], shifts: Floats | None
    ) -> Problems:
        if is_native(self.matcher, queries.device):
            problems = build_problems_from_files(self.matcher, queries, self.store, rows, shifts)
            if problems is not None:
                return problems
        stored, local = self._read(rows)
        return build_problems(self.matcher, queries, stored, local, shifts)

    def _nearest(
        self, queries: Tensor, rows: NDArray[np.int64], shifts: Floats | None, k: int
    ) -> Nearest:
        solver = self.matcher.solver
        if solver == "simplex" and is_native(self.matcher, queries.device):
            nearest = nearest_from_files(self.matcher, queries, self.store, rows, shifts, k)
            if nearest is not None:
                return nearest
        problems = self._problems(queries, rows, shifts)
        parts = problems.cost, problems.stored_weights, problems.query_weights
        top = solve_top_k(*parts, k, solver=solver)
        return Nearest(*(part.cpu().numpy() for part in (top.distance, top.index, top.solved)))

    def _solve_all(self, problems: Problems) -> Floats:
        plan = solve(
            problems.cost,
            problems.stored_weights,
            problems.query_weights,
            solver=self.matcher.solver,
            need_flow=False,
            need_potentials=False,
        )
        # Divided as solve_top_k divides, so that both give the same bits.
        mass = problems.stored_weights.sum(-1, dtype=torch.float64).to(plan.value.dtype)
        distance: Floats = (plan.value / mass).cpu().numpy()
        return distance

    def _matcher_distances(
        self, queries: Tensor, nodes: Tensor, counts: Tensor, local: NDArray[np.int64]
    ) -> Floats:
        """By the matcher, for matches that are not problems over the stored nodes."""
        distance = np.zeros(local.shape, np.float32)
        for count in counts.unique().tolist():
            # Sets of one size together: padding nodes would be clustered or averaged with the rest.
            some = (counts == count).nonzero().flatten()
            place = torch.full((len(counts),), ABSENT)
            place[some] = torch.arange(len(some))
            prepared = self.matcher.prepare(nodes[some.to(nodes.device), :count])
            for query, row in enumerate(local):
                here = np.flatnonzero((row >= 0) & (place.numpy()[row] >= 0))
                if len(here):
                    candidates = place[row[here]].to(nodes.device).unsqueeze(0)
                    found = self.matcher.shortlist(queries[query : query + 1], prepared, candidates)
                    distance[query, here] = 1 - found[0].detach().cpu().numpy()
        return distance

    def _read(self, rows: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
        """The candidates' sets, each once, and where each candidate is among them."""
        if len(rows) == 1 and (rows[0] >= 0).all():
            return self.store.read_encoded(rows[0]), np.arange(rows.shape[1])[None]
        unique, local = np.unique(rows, return_inverse=True)
        local = local.reshape(rows.shape).astype(np.int64)
        if len(unique) and unique[0] == ABSENT:
            unique, local = unique[1:], local - 1
        return self.store.read_encoded(unique), local

    def _flows(self, queries: Tensor, chosen: NDArray[np.int64]) -> Floats:
        """Flows of the answers. Shape: ``[Q, k, N, M]``."""
        stored, local = self._read(chosen)
        nodes = decoded(stored, self.device)
        flows = np.zeros((*chosen.shape, queries.shape[1], nodes.shape[1]), np.float32)
        for query, place in np.argwhere(local >= 0).tolist():
            at = int(local[query, place])
            match = self.matcher.match(queries[query], nodes[at, : int(stored.counts[at])])
            flow = match.flow.cpu().numpy()
            flows[query, place, : flow.shape[0], : flow.shape[1]] = flow
        return flows


def _at(array: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """Entries at some places of every row."""
    return array[np.arange(len(array))[:, None], places]


def _like(array: Ids | Floats | None, as_tensor: bool) -> Any:
    if array is None or not as_tensor or array.dtype == object:
        return array
    return torch.from_numpy(array)
