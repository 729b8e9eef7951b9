"""The DeepEMD similarity of sets of local features: one pair, all pairs, or a shortlist.

Ground cost, node weights and solver meet here; models, files and indexes are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from emd_retrieval._checks import check_finite, check_positive, check_tensor
from emd_retrieval.matching.ground_costs import GroundCost, ground_cost
from emd_retrieval.matching.node_weights import NodeWeights, WeighedNodes, node_weights
from emd_retrieval.progress import progress_counter
from emd_retrieval.transport import emd, solve
from emd_retrieval.transport.problem import InvalidProblemError
from emd_retrieval.transport.solve import check_solver


@dataclass(frozen=True, slots=True)
class SetMatch:
    """Everything about the match of paired sets: what a picture of it needs.

    Attributes:
        similarity: Equation 3 divided by the mass, in [-1, 1] under cosine costs. Shape: ``[...]``.
        cost: Ground costs. Shape: ``[..., N, M]``.
        query_weights: Normalised to a total of one. Shape: ``[..., N]``.
        reference_weights: Normalised to a total of one. Shape: ``[..., M]``.
        flow: Mass moved between nodes; sums to one. Shape: ``[..., N, M]``.
    """

    similarity: Tensor
    cost: Tensor
    query_weights: Tensor
    reference_weights: Tensor
    flow: Tensor


@dataclass(frozen=True, slots=True)
class PreparedSets:
    """Sets with everything that a match needs of each set alone; see :meth:`EMDMatcher.prepare`.

    Attributes:
        ground: Nodes as the ground cost wants them. Shape: ``[B, N, D]``.
        weighed: Raw nodes with their means and scales.
    """

    ground: Tensor
    weighed: WeighedNodes

    def __len__(self) -> int:
        return len(self.ground)

    @property
    def nodes(self) -> Tensor:
        """Raw local features. Shape: ``[B, N, D]``."""
        return self.weighed.nodes

    def at(self, rows: Tensor | slice) -> PreparedSets:
        """The sets at some rows: a slice, or an index of any shape."""
        return PreparedSets(self.ground[rows], self.weighed.at(rows))


@dataclass(frozen=True)
class EMDMatcher:
    """Compares images as sets of local features by the Earth Mover's Distance.

    ``similarity = sum(flow * (1 - cost)) / mass`` (Equation 3, the mass divided out): 1 for a set
    with itself. Every method is differentiable in both sets, costs and weights alike, works in
    float32 (or float64 for float64 sets) whatever autocast says, and takes sets of different sizes
    on the two sides.

    Args:
        ground_cost: ``"cosine"`` (Equation 2) or ``"centered_cosine"`` (the reference code).
        weights: ``"cross_reference"`` (Equation 11) or ``"uniform"``.
        weight_floor: Added to every cross-reference weight.
        weight_floor_scale: ``"relative"`` to the features' scale, or ``"absolute"``.
        solver: A solver of :func:`emd_retrieval.transport.solve`.
        memory_mb: Rough bound on the temporary memory of one chunk of pairs, in MiB. Small chunks
            stay in the caches; where gradients are asked for, what they need is kept on top.

    Raises:
        ValueError: If a name is unknown or a number out of range.

    Example:
        >>> matcher = EMDMatcher()
        >>> sets = torch.randn(3, 14, 8, generator=torch.Generator().manual_seed(0))
        >>> matcher.all_pairs(sets).shape
        torch.Size([3, 3])
        >>> bool((matcher.paired(sets, sets) - 1).abs().max() < 1e-6)
        True
    """

    ground_cost: str = "cosine"
    weights: str = "cross_reference"
    weight_floor: float = 1e-3
    weight_floor_scale: str = "relative"
    solver: str = "simplex"
    memory_mb: float = 32.0

    def __post_init__(self) -> None:
        check_positive("memory_mb", self.memory_mb)
        # Built now, so that a bad name fails where it was written.
        _ = self._ground_cost, self._node_weights
        check_solver(self.solver, {})

    @cached_property
    def _ground_cost(self) -> GroundCost:
        return ground_cost(self.ground_cost)

    @cached_property
    def _node_weights(self) -> NodeWeights:
        return node_weights(
            self.weights, floor=self.weight_floor, floor_scale=self.weight_floor_scale
        )

    @property
    def symmetric(self) -> bool:
        """Whether swapping query and reference leaves the similarity as it is."""
        return self._ground_cost.symmetric

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {
            "ground_cost": self.ground_cost,
            "weights": self.weights,
            "weight_floor": self.weight_floor,
            "weight_floor_scale": self.weight_floor_scale,
            "solver": self.solver,
        }

    def prepare(self, sets: Tensor) -> PreparedSets:
        """Compute once what every match with these sets needs; a gallery is prepared when built.

        Args:
            sets: Shape: ``[B, N, D]``.

        Returns:
            What :meth:`all_pairs` and :meth:`shortlist` take in place of the sets. It holds the
            sets twice, in float32 or float64.

        Raises:
            TypeError: If ``sets`` is not a floating-point tensor.
            ValueError: If it is not 3-D, or has no nodes or channels.
        """
        _check_sets("sets", sets, "B")
        return self._prepare(sets)

    def paired(self, query: Tensor, reference: Tensor) -> Tensor:
        """Similarity of each query set with the reference set at the same place.

        Args:
            query: Shape: ``[..., N, D]``.
            reference: The same leading dimensions. Shape: ``[..., M, D]``.

        Returns:
            Similarities. Shape: ``[...]``.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If shapes do not fit or values are not finite.
        """
        left, right = self._prepare_pair(query, reference)
        with _solving(query, reference):
            return self._solve(
                self._ground_cost.between(left.ground, right.ground),
                *self._node_weights.paired(left.weighed, right.weighed),
            )

    def match(self, query: Tensor, reference: Tensor) -> SetMatch:
        """Like :meth:`paired`, with costs, weights and flow, and without gradients."""
        with torch.no_grad(), _solving(query, reference):
            left, right = self._prepare_pair(query, reference)
            supply, demand = self._node_weights.paired(left.weighed, right.weighed)
            cost = self._ground_cost.between(left.ground, right.ground)
            plan = solve(cost, supply, demand, solver=self.solver)
            assert plan.flow is not None  # noqa: S101 (solve keeps the flow unless told not to)
            return SetMatch(1 - plan.value, cost, supply, demand, plan.flow)

    def all_pairs(
        self,
        query: Tensor | PreparedSets,
        reference: Tensor | PreparedSets | None = None,
        *,
        description: str | None = None,
    ) -> Tensor:
        """Similarity of every query set with every reference set.

        Without ``reference``, or where it is the very object ``query``, the sets are compared among
        themselves; under a symmetric ground cost only one half of the pairs is then solved.

        Args:
            query: Shape: ``[Q, N, D]``.
            reference: Shape: ``[R, M, D]``.
            description: Shows a progress bar under this name.

        Returns:
            Similarities. Shape: ``[Q, R]``.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If shapes do not fit or values are not finite.
        """
        among_themselves = reference is None or reference is query
        left, right = self._both(query, query if reference is None else reference)
        with _solving(left.nodes, right.nodes):
            if among_themselves and self.symmetric:
                return self._all_pairs_symmetric(left, description)
            return self._all_pairs(left, right, description)

    def shortlist(
        self,
        query: Tensor | PreparedSets,
        reference: Tensor | PreparedSets,
        candidates: Tensor,
        *,
        description: str | None = None,
    ) -> Tensor:
        """Similarity of each query set with its own candidates among the reference sets.

        Args:
            query: Shape: ``[Q, N, D]``.
            reference: Shape: ``[R, M, D]``. Prepare it once (:meth:`prepare`) where queries come
                one by one: only the candidates' rows are then touched.
            candidates: Rows of ``reference`` for each query. Shape: ``[Q, C]``, an integer dtype.
            description: Shows a progress bar under this name.

        Returns:
            Similarities. Shape: ``[Q, C]``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes do not fit, values are not finite, or a candidate is not a row.
        """
        left, right = self._both(query, reference)
        _check_candidates(candidates, len(left), len(right))
        count = candidates.shape[1]
        gathered = 2 * right.nodes.shape[1] * right.nodes.shape[2]
        chunk = max(1, self._pairs_at_once(left, right, gathered) // max(1, count))
        rows = []
        with (
            _solving(left.nodes, right.nodes),
            progress_counter(description, total=candidates.numel(), unit="pair") as bar,
        ):
            for start in range(0, len(left), chunk):
                part = left.at(slice(start, start + chunk))
                chosen = right.at(candidates[start : start + chunk])
                weights = self._node_weights.shortlist(part.weighed, chosen.weighed)
                rows.append(self._solve(_rows(self._ground_cost, part, chosen), *weights))
                bar.update(len(part) * count)
        return torch.cat(rows) if rows else left.nodes.new_zeros(0, count)

    def _prepare(self, sets: Tensor) -> PreparedSets:
        with torch.autocast(sets.device.type, enabled=False):
            nodes = sets.to(torch.promote_types(sets.dtype, torch.float32))
            return PreparedSets(self._ground_cost.prepare(nodes), WeighedNodes.of(nodes))

    def _prepare_pair(self, query: Tensor, reference: Tensor) -> tuple[PreparedSets, PreparedSets]:
        _check_sets("query", query, "...")
        _check_sets("reference", reference, "...", query.shape[-1])
        if query.shape[:-2] != reference.shape[:-2]:
            raise ValueError(
                f"reference: expected the leading dimensions of query, {list(query.shape[:-2])}, "
                f"got {list(reference.shape[:-2])}"
            )
        return self._prepare(query), self._prepare(reference)

    def _both(
        self, query: Tensor | PreparedSets, reference: Tensor | PreparedSets
    ) -> tuple[PreparedSets, PreparedSets]:
        """Both sides checked and prepared; the very same object is prepared once."""
        if isinstance(query, PreparedSets):
            left = query
        else:
            _check_sets("query", query, "Q")
            left = self._prepare(query)
        if reference is query:
            return left, left
        if isinstance(reference, PreparedSets):
            _check_sets("reference", reference.nodes, "R", left.nodes.shape[-1])
            return left, reference
        _check_sets("reference", reference, "R", left.nodes.shape[-1])
        return left, self._prepare(reference)

    def _solve(self, cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
        return 1 - emd(cost, supply, demand, solver=self.solver)

    def _all_pairs(
        self, query: PreparedSets, reference: PreparedSets, description: str | None
    ) -> Tensor:
        rows: dict[int, list[Tensor]] = {}
        total = len(query) * len(reference)
        with progress_counter(description, total=total, unit="pair") as bar:
            for at, to in self._blocks(query, reference):
                block = self._block(query.at(at), reference.at(to))
                rows.setdefault(at.start, []).append(block)
                bar.update(block.numel())
        if not rows:
            return query.nodes.new_zeros(len(query), len(reference))
        return torch.cat([torch.cat(row, dim=1) for row in rows.values()])

    def _block(self, query: PreparedSets, reference: PreparedSets) -> Tensor:
        """A rectangle of the grid. Shape: ``[q, r]``."""
        weights = self._node_weights.all_pairs(query.weighed, reference.weighed)
        return self._solve(_grid(self._ground_cost, query, reference), *weights)

    def _all_pairs_symmetric(self, sets: PreparedSets, description: str | None) -> Tensor:
        """Squares along the diagonal by their upper triangles, rectangles beside them whole."""
        size, rows = len(sets), []
        with progress_counter(description, total=size * (size + 1) // 2, unit="pair") as bar:
            for start, stop, rest in self._strips(sets):
                strip = sets.at(slice(start, stop))
                parts = [sets.nodes.new_zeros(stop - start, start), self._triangle(strip)]
                for to in rest:
                    parts.append(self._block(strip, sets.at(to)))
                    bar.update(parts[-1].numel())
                rows.append(torch.cat(parts, dim=1))
                bar.update((stop - start) * (stop - start + 1) // 2)
        if not rows:
            return sets.nodes.new_zeros(size, size)
        upper = torch.cat(rows)
        return upper + upper.triu(1).mT

    def _triangle(self, sets: PreparedSets) -> Tensor:
        """A square on the diagonal, zero below it. Shape: ``[q, q]``."""
        size = len(sets)
        first, second = torch.triu_indices(size, size, device=sets.nodes.device)
        cost = _grid(self._ground_cost, sets, sets)[first, second]
        supply, demand = self._node_weights.all_pairs(sets.weighed, sets.weighed)
        values = self._solve(cost, supply[first, second], demand[first, second])
        square = values.new_zeros(size * size).index_copy(0, first * size + second, values)
        return square.view(size, size)

    def _pairs_at_once(
        self, query: PreparedSets, reference: PreparedSets, gathered: int = 0
    ) -> int:
        """How many pairs fit into the bound; ``gathered`` counts elements copied for each."""
        costs = 2 * query.nodes.shape[1] * reference.nodes.shape[1]
        a_pair = query.nodes.element_size() * (costs + gathered)
        return max(1, int(self.memory_mb * 2**20 / a_pair))

    def _blocks(
        self, query: PreparedSets, reference: PreparedSets
    ) -> Iterator[tuple[slice, slice]]:
        """Cut the grid of pairs into rectangles, as wide as the bound allows, row after row."""
        pairs, size = self._pairs_at_once(query, reference), len(reference)
        width = min(max(size, 1), pairs)
        height = max(1, pairs // width)
        for start in range(0, len(query), height):
            for left in range(0, size, width):
                yield slice(start, min(start + height, len(query))), slice(left, left + width)

    def _strips(self, sets: PreparedSets) -> Iterator[tuple[int, int, list[slice]]]:
        """Cut the upper half into strips: a square on the diagonal, then rectangles."""
        pairs, size, start = self._pairs_at_once(sets, sets), len(sets), 0
        while start < size:
            height = max(1, min(math.isqrt(pairs), pairs // (size - start)))
            stop = min(size, start + height)
            width = max(1, pairs // (stop - start))
            yield start, stop, [slice(left, left + width) for left in range(stop, size, width)]
            start = stop


def _grid(ground: GroundCost, query: PreparedSets, reference: PreparedSets) -> Tensor:
    """Costs of every pair of sets, one GEMM, as a view. Shape: ``[q, r, N, M]``."""
    (q, n, d), (r, m, _) = query.ground.shape, reference.ground.shape
    cost = ground.between(query.ground.reshape(q * n, d), reference.ground.reshape(r * m, d))
    return cost.view(q, n, r, m).transpose(1, 2)


def _rows(ground: GroundCost, query: PreparedSets, chosen: PreparedSets) -> Tensor:
    """Costs of each query against its candidates, one GEMM a query, as a view.

    Shape:
        ``[q, N, D], [q, C, M, D]`` to ``[q, C, N, M]``.
    """
    (q, n, d), (_, c, m, _) = query.ground.shape, chosen.ground.shape
    cost = ground.between(query.ground, chosen.ground.view(q, c * m, d))
    return cost.view(q, n, c, m).transpose(1, 2)


@contextmanager
def _solving(query: Tensor, reference: Tensor) -> Iterator[None]:
    """Autocast off, and faults of costs told as what they are to the caller: faults of features."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        try:
            yield
        except InvalidProblemError:
            check_finite("query", query)
            check_finite("reference", reference)
            raise


def _check_sets(name: str, sets: Tensor, leading: str, channels: int | None = None) -> None:
    sizes = {} if channels is None else {"D": channels}
    nodes = "N" if name in ("query", "sets") else "M"
    check_tensor(name, sets, [leading, nodes, "D"], sizes=sizes)
    if 0 in sets.shape[-2:]:
        raise ValueError(f"{name}: expected at least one node and channel, got {list(sets.shape)}")


def _check_candidates(candidates: Tensor, queries: int, references: int) -> None:
    check_tensor("candidates", candidates, [queries, "C"], floating=False)
    if candidates.is_floating_point() or candidates.dtype == torch.bool:
        raise TypeError(f"candidates: expected an integer tensor, got dtype {candidates.dtype}")
    if candidates.numel() and not (
        0 <= int(candidates.min()) <= int(candidates.max()) < references
    ):
        raise ValueError(
            f"candidates: expected rows of reference, 0 to {references - 1}, "
            f"got {int(candidates.min())} to {int(candidates.max())}"
        )
