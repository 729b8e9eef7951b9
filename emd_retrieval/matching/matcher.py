"""The DeepEMD similarity of sets of local features: one pair, all pairs, or a shortlist.

Ground cost, node weights and solver meet here; models, files and indexes are unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from emd_retrieval._checks import check_finite, check_positive, check_tensor
from emd_retrieval.matching.ground_costs import GroundCost, ground_cost
from emd_retrieval.matching.node_weights import NodeWeights, node_weights
from emd_retrieval.progress import progress_counter
from emd_retrieval.transport import emd, solve
from emd_retrieval.transport.problem import InvalidProblemError


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
        _check_sets(query, reference, leading="...")
        with _solving(query, reference):
            query, reference = _in_solver_precision(query, reference)
            supply, demand = self._node_weights.paired(query, reference)
            return 1 - emd(self._cost(query, reference), supply, demand, solver=self.solver)

    def match(self, query: Tensor, reference: Tensor) -> SetMatch:
        """Like :meth:`paired`, with costs, weights and flow, and without gradients."""
        _check_sets(query, reference, leading="...")
        with torch.no_grad(), _solving(query, reference):
            query, reference = _in_solver_precision(query, reference)
            supply, demand = self._node_weights.paired(query, reference)
            cost = self._cost(query, reference)
            plan = solve(cost, supply, demand, solver=self.solver)
            assert plan.flow is not None  # noqa: S101 (solve keeps the flow unless told not to)
            return SetMatch(1 - plan.value, cost, supply, demand, plan.flow)

    def all_pairs(
        self, query: Tensor, reference: Tensor | None = None, *, description: str | None = None
    ) -> Tensor:
        """Similarity of every query set with every reference set.

        Without ``reference``, or where it is the very tensor ``query``, the sets are compared among
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
        if reference is None:
            reference = query
        _check_sets(query, reference, leading="B")
        with _solving(query, reference):
            query, reference = _in_solver_precision(query, reference)
            if among_themselves and self.symmetric:
                return self._all_pairs_symmetric(query, description)
            return self._all_pairs(query, reference, description)

    def shortlist(
        self,
        query: Tensor,
        reference: Tensor,
        candidates: Tensor,
        *,
        description: str | None = None,
    ) -> Tensor:
        """Similarity of each query set with its own candidates among the reference sets.

        Args:
            query: Shape: ``[Q, N, D]``.
            reference: Shape: ``[R, M, D]``.
            candidates: Rows of ``reference`` for each query. Shape: ``[Q, C]``, an integer dtype.
            description: Shows a progress bar under this name.

        Returns:
            Similarities. Shape: ``[Q, C]``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes do not fit, values are not finite, or a candidate is not a row.
        """
        _check_sets(query, reference, leading="B")
        _check_candidates(candidates, len(query), len(reference))
        count = candidates.shape[1]
        ground, weights = self._ground_cost, self._node_weights
        gathered = 2 * reference.shape[1] * reference.shape[2]
        chunk = max(1, self._pairs_at_once(query, reference, gathered) // max(1, count))
        with (
            _solving(query, reference),
            progress_counter(description, total=candidates.numel(), unit="pair") as bar,
        ):
            query, reference = _in_solver_precision(query, reference)
            prepared, gallery = ground.prepare(reference), weights.gallery(reference)
            rows = []
            for start in range(0, len(query), chunk):
                part = query[start : start + chunk]
                places = candidates[start : start + chunk]
                cost = _rows(ground, ground.prepare(part), prepared[places])
                chosen_gallery = tuple(facts[places] for facts in gallery)
                supply, demand = weights.shortlist(part, reference[places], chosen_gallery)
                rows.append(self._solve(cost, supply, demand))
                bar.update(len(part) * count)
            return torch.cat(rows) if rows else query.new_zeros(0, count)

    def _cost(self, query: Tensor, reference: Tensor) -> Tensor:
        cost = self._ground_cost
        return cost.between(cost.prepare(query), cost.prepare(reference))

    def _solve(self, cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
        return 1 - emd(
            cost.contiguous(), supply.contiguous(), demand.contiguous(), solver=self.solver
        )

    def _all_pairs(self, query: Tensor, reference: Tensor, description: str | None) -> Tensor:
        ground = self._ground_cost
        prepared, prepared_reference = ground.prepare(query), ground.prepare(reference)
        rows: dict[int, list[Tensor]] = {}
        total = len(query) * len(reference)
        with progress_counter(description, total=total, unit="pair") as bar:
            for at, to in self._blocks(query, reference):
                cost = _grid(ground, prepared[at], prepared_reference[to])
                block = self._solve(cost, *self._node_weights.all_pairs(query[at], reference[to]))
                rows.setdefault(at.start, []).append(block)
                bar.update(block.numel())
        if not rows:
            return query.new_zeros(len(query), len(reference))
        return torch.cat([torch.cat(row, dim=1) for row in rows.values()])

    def _all_pairs_symmetric(self, sets: Tensor, description: str | None) -> Tensor:
        ground, size = self._ground_cost, len(sets)
        prepared = ground.prepare(sets)
        places, values = [], []
        with progress_counter(description, total=size * (size + 1) // 2, unit="pair") as bar:
            for at, to in self._blocks(sets, sets, upper=True):
                first, second = _upper_pairs(at, to, sets.device)
                supply, demand = self._node_weights.all_pairs(sets[at], sets[to])
                cost = _grid(ground, prepared[at], prepared[to])[first, second]
                values.append(self._solve(cost, supply[first, second], demand[first, second]))
                places.append((first + at.start) * size + second + to.start)
                bar.update(len(first))
        if not values:
            return sets.new_zeros(size, size)
        upper = sets.new_zeros(size * size).index_copy(0, torch.cat(places), torch.cat(values))
        upper = upper.view(size, size)
        return upper + upper.mT - upper.diagonal().diag_embed()

    def _pairs_at_once(self, query: Tensor, reference: Tensor, gathered: int = 0) -> int:
        """How many pairs fit into the bound; ``gathered`` counts elements copied for each."""
        costs = 2 * query.shape[1] * reference.shape[1]
        return max(1, int(self.memory_mb * 2**20 / (query.element_size() * (costs + gathered))))

    def _blocks(
        self, query: Tensor, reference: Tensor, *, upper: bool = False
    ) -> Iterator[tuple[slice, slice]]:
        """Cut the grid of pairs into blocks, row after row; ``upper`` leaves out what lies below.

        Blocks are as wide as the bound allows, so that each cost matrix is one large GEMM.
        """
        pairs, size = self._pairs_at_once(query, reference), len(reference)
        width = min(max(size, 1), pairs)
        height = max(1, pairs // width)
        for start in range(0, len(query), height):
            for left in range(start if upper else 0, size, width):
                yield (
                    slice(start, min(start + height, len(query))),
                    slice(left, min(left + width, size)),
                )


def _grid(ground: GroundCost, query: Tensor, reference: Tensor) -> Tensor:
    """Costs of every pair of prepared sets, as a view. Shape: ``[q, r, N, M]``."""
    (q, n, d), (r, m, _) = query.shape, reference.shape
    cost = ground.between(query.reshape(q * n, d), reference.reshape(r * m, d))
    return cost.view(q, n, r, m).transpose(1, 2)


def _rows(ground: GroundCost, query: Tensor, chosen: Tensor) -> Tensor:
    """Costs of each prepared query against its candidates, one GEMM a query, as a view.

    Shape:
        ``[q, N, D], [q, C, M, D]`` to ``[q, C, N, M]``.
    """
    (q, n, d), (_, c, m, _) = query.shape, chosen.shape
    cost = ground.between(query, chosen.view(q, c * m, d))
    return cost.view(q, n, c, m).transpose(1, 2)


def _upper_pairs(at: slice, to: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of a block on and above the diagonal of the whole, counted within the block."""
    first = torch.arange(at.start, at.stop, device=device).unsqueeze(1)
    second = torch.arange(to.start, to.stop, device=device).unsqueeze(0)
    kept = (first <= second).nonzero()
    return kept[:, 0], kept[:, 1]


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


def _in_solver_precision(query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    same = reference is query
    dtype = torch.promote_types(torch.promote_types(query.dtype, reference.dtype), torch.float32)
    query = query.to(dtype)
    return query, query if same else reference.to(dtype)


def _check_sets(query: Tensor, reference: Tensor, *, leading: str) -> None:
    sizes = check_tensor("query", query, [leading, "N", "D"])
    check_tensor(
        "reference", reference, [leading if leading == "..." else "R", "M", "D"], sizes=sizes
    )
    if leading == "..." and query.shape[:-2] != reference.shape[:-2]:
        raise ValueError(
            f"reference: expected the leading dimensions of query, {list(query.shape[:-2])}, "
            f"got {list(reference.shape[:-2])}"
        )
    for name, sets in (("query", query), ("reference", reference)):
        if 0 in sets.shape[-2:]:
            raise ValueError(
                f"{name}: expected at least one node and channel, got {list(sets.shape)}"
            )


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
