"""The DeepEMD similarity of sets of local features: one pair, all pairs, or a shortlist.

Ground cost, node weights and solver meet here; models, files and indexes are unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from emd_retrieval._checks import check_choice, check_finite, check_positive, check_tensor
from emd_retrieval.matching.clusters import METHODS, check_cluster_settings, cluster_nodes
from emd_retrieval.matching.ground_costs import GroundCost, ground_cost
from emd_retrieval.matching.node_weights import NodeWeights, WeighedNodes, node_weights
from emd_retrieval.matching.pairs import (
    Block,
    PairPlans,
    PairProblems,
    pair_similarities,
    rectangles,
    solve_pairs,
    upper_half,
)
from emd_retrieval.progress import progress_counter
from emd_retrieval.transport import emd, solve
from emd_retrieval.transport.problem import InvalidProblemError
from emd_retrieval.transport.solve import SOLVERS, check_solver


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
        nodes: Raw local features, as they were passed. Shape: ``[B, N, D]``.
        ground: Nodes as the ground cost wants them. Shape: ``[B, K, E]``.
        weighed: Raw nodes with their means and scales. Shape of the nodes: ``[B, K, D]``; K is N,
            or the number of clusters where these are what is matched.
    """

    nodes: Tensor
    ground: Tensor
    weighed: WeighedNodes

    def __len__(self) -> int:
        return len(self.ground)

    def at(self, rows: Tensor | slice) -> PreparedSets:
        """The sets at some rows: a slice, or an index of any shape."""
        weighed = self.weighed.at(rows)
        nodes = weighed.nodes if self.nodes is self.weighed.nodes else self.nodes[rows]
        return PreparedSets(nodes, self.ground[rows], weighed)


@dataclass(frozen=True)
class EMDMatcher:
    """Compares images as sets of local features by the Earth Mover's Distance.

    ``similarity = sum(flow * (1 - cost)) / mass`` (Equation 3, the mass divided out): 1 for a set
    with itself. Every method is differentiable in both sets, costs and weights alike, works in
    float32 (or float64 for float64 sets) whatever autocast says, and takes sets of different sizes
    on the two sides.

    Args:
        ground_cost: ``"cosine"`` (Equation 2), ``"centered_cosine"`` (the reference code) or
            ``"snr"``, see :func:`ground_cost`.
        weights: ``"cross_reference"`` (Equation 11), ``"uniform"``, or ``"k_means"`` and
            ``"mean_shift"``, which match the clusters of a set's nodes, weighed by their sizes.
        weight_floor: Added to every cross-reference weight.
        weight_floor_scale: ``"relative"`` to the features' scale, or ``"absolute"``.
        weight_gradient: Let gradients reach the weights, exactly; the reference code's OpenCV path
            detaches them.
        clusters: The budget of :func:`cluster_nodes`.
        bandwidth: The radius of :func:`cluster_nodes`.
        coupling: ``"transport"``, or ``"dense"``, the EMD-free connections of Table 2: every node
            is matched with every node, by the product of their weights. Uniform weights then give
            the average of all cosines, cross-reference weights a weighted one.
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
    weight_gradient: bool = True
    clusters: int = 8
    bandwidth: float | None = None
    coupling: str = "transport"
    solver: str = "simplex"
    memory_mb: float = 64.0

    def __post_init__(self) -> None:
        check_positive("memory_mb", self.memory_mb)
        check_choice("coupling", self.coupling, ["transport", "dense"])
        check_cluster_settings(self.clusters, self.bandwidth)
        check_positive("weight_floor", self.weight_floor, allow_zero=True)
        check_choice("weight_floor_scale", self.weight_floor_scale, ["relative", "absolute"])
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
            "weight_gradient": self.weight_gradient,
            "clusters": self.clusters,
            "bandwidth": self.bandwidth,
            "coupling": self.coupling,
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
                self._node_weights.paired(left.weighed, right.weighed),
            )

    def match(self, query: Tensor, reference: Tensor) -> SetMatch:
        """Like :meth:`paired`, with costs, weights and flow, and without gradients."""
        with torch.no_grad(), _solving(query, reference):
            left, right = self._prepare_pair(query, reference)
            supply, demand = self._node_weights.paired(left.weighed, right.weighed)
            cost = self._ground_cost.between(left.ground, right.ground)
            if self.coupling == "dense":
                flow = supply.unsqueeze(-1) * demand.unsqueeze(-2)
                return SetMatch(1 - (flow * cost).sum((-2, -1)), cost, supply, demand, flow)
            plan = solve(cost, supply, demand, solver=self.solver)
            assert plan.flow is not None  # noqa: S101 (solve keeps the flow unless told not to)
            return SetMatch(1 - plan.value, cost, supply, demand, plan.flow)

    def all_pairs(
        self,
        query: Tensor | PreparedSets,
        reference: Tensor | PreparedSets | None = None,
        *,
        description: str | None = None,
        plans: PairPlans | None = None,
    ) -> Tensor:
        """Similarity of every query set with every reference set.

        Without ``reference``, or where it is the very object ``query``, the sets are compared among
        themselves; under a symmetric ground cost only one half of the pairs is then solved.

        Args:
            query: Shape: ``[Q, N, D]``.
            reference: Shape: ``[R, M, D]``.
            description: Shows a progress bar under this name.
            plans: An empty one is filled with everything that gradients need; a filled one saves
                the solving where sets and settings are the very same. Without an exact coupling
                there is nothing to keep, and it stays empty.

        Returns:
            Similarities. Shape: ``[Q, R]``.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If shapes do not fit or values are not finite.
        """
        among_themselves = reference is None or reference is query
        left, right = self._both(query, query if reference is None else reference)
        symmetric = among_themselves and self.symmetric
        pairs = self._pairs_at_once(left, right)
        Q, R = len(left), len(right)
        blocks = list(upper_half(Q, pairs) if symmetric else rectangles(Q, R, pairs))
        total = sum(block.count for block in blocks)
        with (
            _solving(left.nodes, right.nodes),
            progress_counter(description, total=total, unit="pair") as bar,
        ):
            if self._keeps_plans:
                return self._exact_pairs(left, right, symmetric, pairs, bar.update, plans)
            return self._composed_pairs(left, right, symmetric, pairs, bar.update)

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
        gathered = 2 * right.ground.shape[1] * right.ground.shape[2]
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
                rows.append(self._solve(_rows(self._ground_cost, part, chosen), weights))
                bar.update(len(part) * count)
        return torch.cat(rows) if rows else left.nodes.new_zeros(0, count)

    def _prepare(self, sets: Tensor) -> PreparedSets:
        with torch.autocast(sets.device.type, enabled=False):
            # Proxies come as columns of a parameter.
            nodes = sets.to(torch.promote_types(sets.dtype, torch.float32)).contiguous()
            if self.weights in METHODS:
                matched, weights, _ = cluster_nodes(
                    nodes.reshape(-1, *nodes.shape[-2:]),
                    self.weights,
                    clusters=self.clusters,
                    bandwidth=self.bandwidth,
                )
                matched = matched.view(*nodes.shape[:-2], *matched.shape[1:])
                weighed = WeighedNodes.of(matched, weights.view(matched.shape[:-1]))
            else:
                weighed = WeighedNodes.of(nodes)
            return PreparedSets(nodes, self._ground_cost.prepare(weighed.nodes), weighed)

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

    def _solve(self, cost: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        supply, demand = weights
        if not self.weight_gradient:
            supply, demand = supply.detach(), demand.detach()
        if self.coupling == "dense":
            value = ((cost @ demand.unsqueeze(-1)).squeeze(-1) * supply).sum(dim=-1)
            sound = torch.isfinite(value)
            if not bool(sound.all()):
                first = int(torch.nonzero(~sound.flatten())[0])
                raise InvalidProblemError(
                    "cost, weights: expected finite values", first, value.shape
                )
            return 1 - value
        return 1 - emd(cost, supply, demand, solver=self.solver)

    @property
    def _keeps_plans(self) -> bool:
        """Whether a solver's plan is all that a gradient needs."""
        solver = SOLVERS[self.solver]
        return self.coupling == "transport" and solver.has_potentials and not solver.differentiable

    def _exact_pairs(
        self,
        query: PreparedSets,
        reference: PreparedSets,
        symmetric: bool,
        pairs: int,
        advance: Callable[[int], object],
        plans: PairPlans | None,
    ) -> Tensor:
        """All pairs from plans."""
        left, right = self._ground_cost.query_side(query.ground), reference.ground
        kept = plans is not None
        if not kept and not (
            torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
        ):

            def of_block(block: Block) -> tuple[Tensor, Tensor]:
                rows, cols = query.weighed.at(block.rows), reference.weighed.at(block.cols)
                return self._node_weights.all_pairs(rows, cols)

            problems = PairProblems(of_block, self.solver, symmetric, pairs, advance)
            similarity = solve_pairs(left, right, problems).similarity
            assert similarity is not None  # noqa: S101 (it has just been solved)
            return similarity
        supply, demand = self._node_weights.all_pairs(query.weighed, reference.weighed)
        learn = self.weight_gradient and self.weights == "cross_reference"
        if not learn:
            supply, demand = supply.detach(), demand.detach()

        def of_all(block: Block) -> tuple[Tensor, Tensor]:
            return supply.detach()[block.rows, block.cols], demand.detach()[block.rows, block.cols]

        problems = PairProblems(of_all, self.solver, symmetric, pairs, advance)
        if plans is not None and not plans.filled:
            plans.fill(solve_pairs(left, right, problems, need_flow=True, need_potentials=learn))
        return pair_similarities(left, right, supply, demand, problems, plans)

    def _composed_pairs(
        self,
        query: PreparedSets,
        reference: PreparedSets,
        symmetric: bool,
        pairs: int,
        advance: Callable[[int], object],
    ) -> Tensor:
        """All pairs by plain autograd."""
        Q, R = len(query), len(reference)
        rows: dict[int, list[Tensor]] = {}
        for block in upper_half(Q, pairs) if symmetric else rectangles(Q, R, pairs):
            part, other = query.at(block.rows), reference.at(block.cols)
            weights = self._node_weights.all_pairs(part.weighed, other.weighed)
            similarity = self._solve(_grid(self._ground_cost, part, other), weights)
            start = block.rows.start
            left_of = [similarity.new_zeros(len(part), start)] if symmetric else []
            rows.setdefault(start, left_of).append(similarity)
            advance(block.count)
        if not rows:
            return query.nodes.new_zeros(Q, R)
        full = torch.cat([torch.cat(row, dim=1) for row in rows.values()])
        return full.triu() + full.triu(1).mT if symmetric else full

    def _pairs_at_once(
        self, query: PreparedSets, reference: PreparedSets, gathered: int = 0
    ) -> int:
        """How many pairs fit into the bound; ``gathered`` counts elements copied for each."""
        costs = 2 * query.ground.shape[1] * reference.ground.shape[1]
        a_pair = query.nodes.element_size() * (costs + gathered)
        return max(1, int(self.memory_mb * 2**20 / a_pair))


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
        except InvalidProblemError as error:
            for name, sets in (("query", query), ("reference", reference)):
                check_finite(name, sets)
            largest = max(float(sets.detach().abs().max()) for sets in (query, reference))
            # Costs and weights take products of two features, summed over channels and nodes.
            if largest**2 * query.shape[-1] * query.shape[-2] > torch.finfo(query.dtype).max / 1e6:
                raise ValueError(
                    f"query, reference: expected features whose products {query.dtype} holds, got "
                    f"some of {largest:.3g}; divide them by a constant (similarities stay as they "
                    "are) or pass float64"
                ) from error
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
