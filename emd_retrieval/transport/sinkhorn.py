"""Entropic transport by Sinkhorn's iterations in the log domain, on any torch device.

An approximation: what it is good for here is comparison, and devices without an exact solver. The
linear algebra of its gradient is that of the interior point, `qp.NewtonSystem`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emd_retrieval._checks import check_positive
from emd_retrieval.transport.newton import NewtonSystem, outer_sum
from emd_retrieval.transport.plan import TransportPlan
from emd_retrieval.transport.qp import centred, refuse_second_derivative

_ITERATIONS_A_CHECK = 10


def solve_sinkhorn(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    need_flow: bool = True,
    need_potentials: bool = True,
    epsilon: float = 0.05,
    iterations: int = 100,
    tolerance: float = 0.0,
) -> TransportPlan:
    r"""Solve entropic transportation problems: ``cost . x + epsilon * KL(x | supply demand')``.

    The value is ``cost . x`` at the minimum, without the entropy. It is never below the exact value
    and at most ``epsilon * mass * min(H(supply), H(demand))`` above it, ``H`` the entropy of the
    weights as shares, so ``epsilon * mass * log(min(N, M))`` at most. That is at convergence, which
    takes on the order of ``range(cost) / epsilon`` iterations. After fewer, every demand is met
    exactly but supplies are off, and the value may fall short of the exact one.

    Value and flow are differentiable once, by the implicit function theorem at the minimum: the
    gradient is that of the converged value ``cost . x(cost, supply, demand)`` and of the converged
    flow. Unrolling would differentiate the truncated iteration instead and keep its hundred steps
    in memory; the envelope theorem would cost nothing but give the gradient of another quantity,
    the objective with its entropy. Gradients along weights are centred, as `solve_qp`'s are.

    Args:
        cost: Ground costs, of any sign.
        supply: Supplier weights, zero or more; exact zeros are fine.
        demand: Demander weights, likewise, with the same total.
        need_flow: Return the flow.
        need_potentials: Return the potentials.
        epsilon: Strength of the entropy, in units of cost.
        iterations: Most iterations; each updates both sides.
        tolerance: Stop once no more than this share of the mass is misplaced, in every problem.
            Looked at every ten iterations, for which a GPU has to wait; 0 never looks.

    Returns:
        The plan, in the dtype of the inputs. Its potentials are those of the entropic problem:
        ``flow = supply demand' exp((u + v - cost) / epsilon) / mass``. They tend to LP duals with
        epsilon and are no dual certificate before. They carry no gradient.

    Shape:
        - cost: ``[B, N, M]``, supply: ``[B, N]``, demand: ``[B, M]``, all of one float dtype.

    Raises:
        ValueError: If epsilon or iterations are not positive, or the tolerance is negative.
    """
    check_positive("epsilon", epsilon)
    check_positive("iterations", iterations)
    check_positive("tolerance", tolerance, allow_zero=True)
    value, flow, supply_potential, demand_potential = _Sinkhorn.apply(
        cost, supply, demand, epsilon, iterations, tolerance
    )
    return TransportPlan(
        value,
        flow if need_flow else None,
        supply_potential if need_potentials else None,
        demand_potential if need_potentials else None,
    )


class _Sinkhorn(torch.autograd.Function):
    """Value and flow of the entropic problem, with the implicit gradient at its minimum."""

    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        supply: Tensor,
        demand: Tensor,
        epsilon: float,
        iterations: int,
        tolerance: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = supply.sum(1, keepdim=True)
        # The log of a zero weight is minus infinity. It only ever enters a sum of exponentials, so
        # the potentials of empty nodes stay finite and their flow is exactly zero.
        log_supply = (supply / total).log()
        log_demand = (demand / demand.sum(1, keepdim=True)).log()
        kernel = cost / -epsilon
        rows, columns = torch.zeros_like(supply), torch.zeros_like(demand)
        for step in range(iterations):
            fresh = -(kernel + (columns + log_demand)[:, None, :]).logsumexp(2)
            if tolerance and step and step % _ITERATIONS_A_CHECK == 0:
                shipped = (log_supply + rows - fresh).exp()
                misplaced = 0.5 * (shipped - log_supply.exp()).abs().sum(1)
                if bool((misplaced <= tolerance).all()):
                    break
            rows = fresh
            columns = -(kernel + (rows + log_supply)[:, :, None]).logsumexp(1)
        flow = kernel + outer_sum(rows + log_supply, columns + log_demand)
        flow = flow.exp_().mul_(total[:, :, None])

        ctx.epsilon = epsilon
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cost, flow, rows + log_supply, columns + log_demand, rows, columns)
        potentials = centred(rows * epsilon, columns * epsilon)
        ctx.mark_non_differentiable(*potentials)
        return (cost * flow).sum((1, 2)), flow, *potentials

    @staticmethod
    def backward(
        ctx: Any, grad_value: Tensor | None, grad_flow: Tensor | None, *no_potentials: None
    ) -> tuple[Tensor | None, ...]:
        """Solve the adjoint of the optimality conditions, whose Hessian is ``epsilon / flow``.

        As in the interior point, the cost is the gradient of the value with respect to the flow,
        and taking off the potentials first leaves the solve with what is small.
        """
        refuse_second_derivative("solve_sinkhorn")
        dtype = ctx.saved_tensors[0].dtype
        cost, flow, row_logits, column_logits, *potentials = (x.double() for x in ctx.saved_tensors)
        rows, columns = (ctx.epsilon * potential for potential in potentials)
        gradient = torch.zeros_like(cost)
        along_value = cost.new_zeros(len(cost), 1)
        if grad_flow is not None:
            gradient += grad_flow
        if grad_value is not None:
            along_value = grad_value.double()[:, None]
            gradient += along_value[:, :, None] * (cost - outer_sum(rows, columns))

        # Parts of the problem that only flows below rounding tie would be tied by noise.
        logits = outer_sum(row_logits, column_logits)
        floor = 1e-12 * flow.amax((1, 2), keepdim=True)
        conductance = torch.maximum(flow, floor).masked_fill_(logits == -torch.inf, 0.0)
        system = NewtonSystem(conductance / ctx.epsilon)
        adjoint, rows_adjoint, columns_adjoint = system.solve(gradient, 0.0, 0.0)
        grad_rows, grad_columns = -rows_adjoint, -columns_adjoint
        # At an empty node the adjoint says nothing; its first mass would go as its softmin says.
        kernel = cost / -ctx.epsilon
        spread = (kernel + column_logits[:, None, :]).softmax(2)
        first = (spread * (gradient - grad_columns[:, None, :])).sum(2)
        grad_rows = torch.where(row_logits == -torch.inf, first, grad_rows)
        spread = (kernel + row_logits[:, :, None]).softmax(1)
        first = (spread * (gradient - grad_rows[:, :, None])).sum(1)
        grad_columns = torch.where(column_logits == -torch.inf, first, grad_columns)

        grad_cost = along_value[:, :, None] * flow - adjoint
        grad_supply, grad_demand = centred(
            grad_rows + along_value * rows, grad_columns + along_value * columns
        )
        grads = (grad.to(dtype) for grad in (grad_cost, grad_supply, grad_demand))
        return *grads, None, None, None
