"""Batched transportation problems: exact and approximate solvers behind one interface.

Costs and weights in, plans and their gradients out; images, features and losses are unknown here.
"""

from emd_retrieval.transport.autograd import emd
from emd_retrieval.transport.bounds import lower_bound
from emd_retrieval.transport.cuda.faults import raise_pending_faults
from emd_retrieval.transport.plan import TransportPlan
from emd_retrieval.transport.solve import available_solvers, solve
from emd_retrieval.transport.top_k import TopK, solve_top_k

__all__ = [
    "TopK",
    "TransportPlan",
    "available_solvers",
    "emd",
    "lower_bound",
    "raise_pending_faults",
    "solve",
    "solve_top_k",
]
