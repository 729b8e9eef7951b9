"""The exact simplex on CUDA: the kernel, its compilation at run time, launches, deferred faults.

CPU problems and the choice between solvers are not handled here.
"""

from emd_retrieval.transport.cuda.faults import raise_pending_faults
from emd_retrieval.transport.cuda.launcher import solve_simplex_cuda

__all__ = ["raise_pending_faults", "solve_simplex_cuda"]
