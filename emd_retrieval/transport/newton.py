"""The linear algebra of quadratic transportation programs: a KKT system through a small Laplacian.

One Newton step, or one implicit gradient, of `qp`; no program, no iteration and no autograd here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def outer_sum(rows: Tensor, columns: Tensor) -> Tensor:
    """Add a number for each row and one for each column: ``[B, N], [B, M] -> [B, N, M]``."""
    return rows[:, :, None] + columns[:, None, :]


class NewtonSystem:
    r"""Solves ``H x = h + A' y``, ``A x = b`` for a batch, with ``H = diag(1 / D) + r r'``.

    ``A`` sums a flow into its marginals, so ``A D A'`` is the Laplacian of the bipartite graph of
    suppliers and demanders with conductances ``D``. Eliminating the larger of its two diagonal
    blocks leaves the Laplacian of a graph of ``min(N, M)`` nodes, which is factored. ``A`` has rank
    ``N + M - 1``, so the last pivot is zero: dropping that row grounds its node.

    Close to the optimum conductances span twenty orders of magnitude, and where the support falls
    apart (equal or integer weights) the parts are tied by the smallest alone. A plain Cholesky
    factorisation rounds these ties away, and regularised it still lost one problem in some
    thousands. But the pivots of a Laplacian are sums of off-diagonal entries, and elimination only
    adds to those: done without a single subtraction, every entry of the factor is accurate.
    Solutions are refined against the true system. The rank-one term is left to the formula of
    Sherman and Morrison.

    Args:
        conductance: ``D``, zero or more, zero where there is no arc. Float64.
        rank_one: ``r``, or ``None`` for zero.

    Shape:
        - conductance, rank_one: ``[B, N, M]``.
    """

    def __init__(self, conductance: Tensor, rank_one: Tensor | None = None) -> None:
        self._conductance = conductance
        self._transposed = conductance.shape[1] < conductance.shape[2]
        arcs = conductance.mT if self._transposed else conductance
        rows, columns = arcs.sum(2), arcs.sum(1)
        # A node without arcs gets the pivot 1: nothing is shipped there and its potential is moot.
        self._row_pivot = torch.where(rows > 0, rows, 1.0)
        self._share = arcs / self._row_pivot[:, :, None]
        self._factor = _laplacian_factor(arcs.mT @ self._share)
        self._ground = columns.argmax(1, keepdim=True)
        self._rank_one = rank_one
        if rank_one is not None:
            image, rows, columns = self._solve_diagonal(rank_one, 0.0, 0.0, refinements=1)
            self._image, self._image_potentials = image, (rows, columns)
            # Equal to r . image, but a sum of positive terms.
            energy = (image * (rank_one + outer_sum(rows, columns))).sum((1, 2))
            self._gain = 1.0 / (1.0 + energy)

    def solve(
        self, h: Tensor, supply: Tensor | float, demand: Tensor | float, *, refinements: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``x`` and the two sides of ``y`` for the marginals ``b = (supply, demand)``.

        Shape:
            - h: ``[B, N, M]``, supply: ``[B, N]``, demand: ``[B, M]``, or 0 for no change.
            - Output: ``[B, N, M]``, ``[B, N]``, ``[B, M]``.
        """
        flow, rows, columns = self._solve_diagonal(h, supply, demand, refinements=refinements)
        if self._rank_one is None:
            return flow, rows, columns
        amount = self._gain * (self._rank_one * flow).sum((1, 2))
        return (
            torch.addcmul(flow, amount[:, None, None], self._image, value=-1),
            torch.addcmul(rows, amount[:, None], self._image_potentials[0], value=-1),
            torch.addcmul(columns, amount[:, None], self._image_potentials[1], value=-1),
        )

    def _solve_diagonal(
        self, h: Tensor, supply: Tensor | float, demand: Tensor | float, *, refinements: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        flow = self._conductance * h
        rows, columns = self._potentials(supply - flow.sum(2), demand - flow.sum(1))
        flow = outer_sum(rows, columns).add_(h).mul_(self._conductance)
        for _ in range(refinements):
            row_error, column_error = self._potentials(supply - flow.sum(2), demand - flow.sum(1))
            rows, columns = rows + row_error, columns + column_error
            # Added to the flow, not recomputed from the sums: a large conductance would turn the
            # rounding of the potentials into a visible flow.
            flow.addcmul_(outer_sum(row_error, column_error), self._conductance)
        return flow, rows, columns

    def _potentials(self, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
        """Solve ``A D A' y = (supply, demand)``."""
        rows, columns = (demand, supply) if self._transposed else (supply, demand)
        columns = torch.baddbmm(columns[:, :, None], self._share.mT, rows[:, :, None], alpha=-1)
        columns = torch.cholesky_solve(columns, self._factor, upper=True)
        # The free constant, from the node that happened to be last to the best connected one: that
        # one moves least, and so nothing drifts.
        columns -= columns.gather(1, self._ground[:, :, None])
        rows = rows / self._row_pivot - (self._share @ columns)[:, :, 0]
        return (columns[:, :, 0], rows) if self._transposed else (rows, columns[:, :, 0])


def _laplacian_factor(weights: Tensor) -> Tensor:
    """Upper Cholesky factor of graph Laplacians, the last node grounded, without subtractions.

    Args:
        weights: Symmetric weights of the edges, zero or more; overwritten. The diagonal is ignored.

    Shape:
        - weights and output: ``[B, K, K]``.
    """
    size = weights.shape[1]
    degrees = []
    for k in range(size - 1):
        edges = weights[:, k, k + 1 :]
        degree = edges.sum(1, keepdim=True)
        degrees.append(degree)
        # Eliminating a node joins its neighbours; one without edges leaves them as they are.
        shares = edges / degree.clamp(min=torch.finfo(degree.dtype).tiny)
        weights[:, k + 1 :, k + 1 :].addcmul_(edges[:, :, None], shares[:, None, :])
    # What rounding leaves over for the grounded node must not move it.
    degrees.append(torch.full_like(weights[:, :1, 0], torch.finfo(weights.dtype).max ** 0.5))
    pivots = torch.cat(degrees, 1)
    roots = torch.where(pivots > 0, pivots, 1.0).sqrt()
    weights /= -roots[:, :, None]
    weights.diagonal(dim1=1, dim2=2).copy_(roots)
    return weights
