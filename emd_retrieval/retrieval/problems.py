"""Transportation problems of queries against their candidates, straight from stored codes.

Cosine costs on the CPU are written by the native core in one pass over the codes; everything else
is built from the pieces of :mod:`emd_retrieval.matching`, on any device. Nothing is solved here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval.matching import (
    EMDMatcher,
    WeighedNodes,
    ground_cost,
    node_weights,
    normalize_weights,
)
from emd_retrieval.retrieval import _problems
from emd_retrieval.retrieval.candidates import ABSENT
from emd_retrieval.retrieval.store import EncodedSets, LocalFeatureStore
from emd_retrieval.retrieval.store.store import SetPlaces
from emd_retrieval.transport.simplex import MAX_NODES, MOST_PIVOTS

_PLAIN_WEIGHTS = ("cross_reference", "uniform")
_CANNOT_BE_CHOSEN = 4.0
"""Above every cosine cost, by so much that rounding does not matter."""


@dataclass(frozen=True)
class Problems:
    """One problem a query and candidate; the stored set is the supplier.

    Attributes:
        cost: Shape: ``[Q, C, M, N]``, N the query's nodes.
        stored_weights: Zero on padding nodes. Shape: ``[Q, C, M]``.
        query_weights: Shape: ``[Q, C, N]``.
    """

    cost: Tensor
    stored_weights: Tensor
    query_weights: Tensor


@dataclass(frozen=True)
class Nearest:
    """The nearest candidates of each query, nearest first; equal ones in the candidates' order.

    Attributes:
        distance: Value divided by mass, shifts included. Shape: ``[Q, k]``.
        index: Their places among the candidates. Shape: ``[Q, k]``.
        solved: How many problems of each query were solved to the end. Shape: ``[Q]``.
    """

    distance: NDArray[np.float32]
    index: NDArray[np.int64]
    solved: NDArray[np.int64]


def has_problems(matcher: EMDMatcher) -> bool:
    """Whether a match is one transportation problem over the stored nodes themselves.

    Otherwise (clustered nodes, dense connections) the matcher alone knows what it is.
    """
    return matcher.weights in _PLAIN_WEIGHTS and getattr(matcher, "coupling", "transport") == (
        "transport"
    )


def is_native(matcher: EMDMatcher, device: torch.device) -> bool:
    """Whether :func:`build_problems` writes them by the native core."""
    return has_problems(matcher) and matcher.ground_cost == "cosine" and device.type == "cpu"


def build_problems(
    matcher: EMDMatcher,
    queries: Tensor,
    stored: EncodedSets,
    rows: NDArray[np.int64],
    shifts: NDArray[np.float32] | None = None,
    *,
    instruction_set: str | None = None,
) -> Problems:
    """Costs (Equation 2) and weights (Equation 11) of each query against its candidates.

    Args:
        matcher: Whose problems; :func:`has_problems` holds.
        queries: On the device where the problems are wanted, finite. Shape: ``[Q, N, D]``, float32.
        stored: Sets as a store gives them.
        rows: Places of the candidates among ``stored``; -1 for a candidate that is not there, whose
            costs are above all others. Shape: ``[Q, C]``.
        shifts: Added to all costs of a candidate. Shape: ``[Q, C]``.
        instruction_set: Of the native core; the best one by default.
    """
    if is_native(matcher, queries.device):
        return _native_problems(matcher, queries, stored, rows, shifts, instruction_set)
    return _tensor_problems(matcher, queries, stored, rows, shifts)


def build_problems_from_files(
    matcher: EMDMatcher,
    queries: Tensor,
    store: LocalFeatureStore,
    rows: NDArray[np.int64],
    shifts: NDArray[np.float32] | None = None,
) -> Problems | None:
    """As :func:`build_problems`, each set read and decoded where it is needed.

    Args:
        matcher: Whose problems; :func:`is_native` holds.
        queries: On the CPU. Shape: ``[Q, N, D]``, float32.
        store: Of the candidates.
        rows: Their positions in the store; -1 as in :func:`build_problems`. Shape: ``[Q, C]``.
        shifts: As in :func:`build_problems`.

    Returns:
        ``None`` if the store has to look at the sets itself: where N varies, a set was not held
        against its checksum yet, or cannot be read (the store tells which).
    """
    found = _places(store, rows)
    if found is None:
        return None
    places, local = found
    (q, c), n, m = rows.shape, queries.shape[1], store.manifest.nodes or 0
    problems = Problems(torch.empty(q, c, m, n), torch.empty(q, c, m), torch.empty(q, c, n))
    whole = _problems.write_problems_from_files(
        queries.contiguous().numpy(),
        places.files,
        places.offsets,
        store.manifest.codec,
        local,
        *_settings(matcher, shifts),
        *_arrays(problems),
        torch.get_num_threads(),
        None,
    )
    return problems if whole else None


def nearest_from_files(
    matcher: EMDMatcher,
    queries: Tensor,
    store: LocalFeatureStore,
    rows: NDArray[np.int64],
    shifts: NDArray[np.float32] | None,
    k: int,
) -> Nearest | None:
    """The ``k`` nearest candidates of each query, from the store's files to the answer in one call.

    Problems are those of :func:`build_problems_from_files`, solved as
    :func:`emd_retrieval.transport.solve_top_k` does, a query at a time. A distance is a problem's
    value divided by its mass; sums in float64 of weights above ``2^-29`` of their total do not
    depend on their order.

    Args:
        matcher: Whose problems; :func:`is_native` holds, and it solves by the simplex.
        queries: On the CPU. Shape: ``[Q, N, D]``, float32.
        store: Of the candidates.
        rows: As in :func:`build_problems_from_files`.
        shifts: As in :func:`build_problems`.
        k: From 1 to C.

    Returns:
        ``None`` where :func:`build_problems_from_files` gives none, where a side has more nodes
        than the native solver takes, or a problem has a fault, which the solver can tell.
    """
    n, m = queries.shape[1], store.manifest.nodes or 0
    if max(n, m) > MAX_NODES:
        return None
    found = _places(store, rows)
    if found is None:
        return None
    places, local = found
    nearest = Nearest(
        np.empty((len(rows), k), np.float32),
        np.empty((len(rows), k), np.int64),
        np.empty(len(rows), np.int64),
    )
    whole = _problems.nearest_from_files(
        queries.contiguous().numpy(),
        places.files,
        places.offsets,
        store.manifest.codec,
        m,
        local,
        *_settings(matcher, shifts),
        nearest.distance,
        nearest.index,
        nearest.solved,
        MOST_PIVOTS,
        torch.get_num_threads(),
    )
    return nearest if whole else None


def _places(
    store: LocalFeatureStore, rows: NDArray[np.int64]
) -> tuple[SetPlaces, NDArray[np.int64]] | None:
    """Where the candidates that are there lie, and which of these each candidate is."""
    flat = rows.reshape(-1)
    if len(flat) and flat.min() < 0:
        there = np.flatnonzero(flat != ABSENT)
        local = np.full(len(flat), ABSENT)
        local[there] = np.arange(len(there))
        flat = flat[there]
    else:
        local = np.arange(len(flat))
    places = store.places(flat)
    return None if places is None else (places, local.reshape(rows.shape))


def _native_problems(
    matcher: EMDMatcher,
    queries: Tensor,
    stored: EncodedSets,
    rows: NDArray[np.int64],
    shifts: NDArray[np.float32] | None,
    instruction_set: str | None,
) -> Problems:
    (q, c), n, m = rows.shape, queries.shape[1], stored.codes.shape[1]
    counts = stored.counts.numpy()
    padded = bool((counts != m).any())
    problems = Problems(torch.empty(q, c, m, n), torch.empty(q, c, m), torch.empty(q, c, n))
    _problems.write_problems(
        queries.contiguous().numpy(),
        stored.codes.numpy(),
        None if stored.scales is None else stored.scales.numpy(),
        counts if padded else None,
        np.ascontiguousarray(rows),
        *_settings(matcher, shifts),
        *_arrays(problems),
        torch.get_num_threads(),
        instruction_set,
    )
    return problems


def _settings(
    matcher: EMDMatcher, shifts: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32] | None, bool, float, bool, float]:
    """Shifts, uniform, floor, relative floor and absent cost, as the native core takes them."""
    absent = _CANNOT_BE_CHOSEN
    if shifts is not None:
        absent += 2 * float(np.abs(shifts).max(initial=0))
    uniform, relative = matcher.weights == "uniform", matcher.weight_floor_scale == "relative"
    return shifts, uniform, matcher.weight_floor, relative, absent


def _arrays(
    problems: Problems,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    cost, stored, query = problems.cost, problems.stored_weights, problems.query_weights
    return cost.numpy(), stored.numpy(), query.numpy()


def _tensor_problems(
    matcher: EMDMatcher,
    queries: Tensor,
    stored: EncodedSets,
    rows: NDArray[np.int64],
    shifts: NDArray[np.float32] | None,
) -> Problems:
    device = queries.device
    ground = ground_cost(matcher.ground_cost)
    weights = node_weights(
        matcher.weights, floor=matcher.weight_floor, floor_scale=matcher.weight_floor_scale
    )
    nodes, counts = decoded(stored, device), stored.counts.to(device)
    places = torch.from_numpy(rows).to(device)
    absent, places = places < 0, places.clamp_min(0)
    (q, c), n, (_, m, _) = rows.shape, queries.shape[1], nodes.shape

    # One GEMM a query; the candidates' rows are gathered, the query's never repeated.
    prepared = ground.prepare(nodes)[places].flatten(1, 2)
    cost = ground.between(ground.prepare(queries), prepared).view(q, n, c, m).permute(0, 2, 3, 1)
    if shifts is not None:
        cost = cost + torch.from_numpy(shifts).to(device)[:, :, None, None]
    cost = cost.contiguous()
    cost[absent] = cost.abs().max() + 1 if cost.numel() else 0.0

    real = torch.arange(m, device=device) < counts[:, None]
    squares = nodes.square().sum(dim=(1, 2)) / counts
    tiny = torch.finfo(nodes.dtype).tiny
    sets = WeighedNodes(
        nodes, nodes.sum(dim=1) / counts[:, None], squares.clamp_min(tiny).sqrt()
    ).at(places)
    query_weights, stored_weights = weights.shortlist(WeighedNodes.of(queries), sets)
    stored_weights = stored_weights * real[places]
    return Problems(
        cost,
        stored_weights / stored_weights.sum(dim=-1, keepdim=True),
        normalize_weights(query_weights),
    )


def decoded(stored: EncodedSets, device: torch.device) -> Tensor:
    """The sets in float32 on a device; what travels there is the codes. Shape: ``[n, N, D]``."""
    scales = None if stored.scales is None else stored.scales.to(device)
    return EncodedSets(stored.codes.to(device), scales, stored.counts).decode()
