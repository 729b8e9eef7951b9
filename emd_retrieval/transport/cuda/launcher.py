"""Launches of the CUDA simplex on torch tensors: outputs, arguments, stream and context.

What runs on the device is ``network_simplex.cu``; how it is compiled, ``kernel.py``.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from emd_retrieval.transport.cuda.faults import TOO_MANY_PIVOTS, FaultLog, fault_log
from emd_retrieval.transport.cuda.kernel import (
    LANES,
    NODES,
    WARPS_PER_BLOCK,
    Variant,
    cuda_core,
    load_kernel,
)
from emd_retrieval.transport.plan import TransportPlan
from emd_retrieval.transport.problem import raise_fault

Launch = Callable[[Variant, int, tuple[object, ...]], None]
"""Runs a variant with a number of blocks on the kernel's arguments in order."""


def solve_simplex_cuda(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    need_flow: bool = True,
    need_potentials: bool = True,
    check: bool = False,
) -> TransportPlan:
    """Solve exactly on a CUDA device (compute capability 8.0 or later), one warp a problem.

    The kernel is compiled on first use of a size and runs on torch's current stream. The call does
    not wait for it. A problem with bad values gets NaN for an answer; its fault is raised by
    :func:`raise_pending_faults` or by a later call, unless ``check`` asks for it here.

    Args:
        cost: Any finite scale and sign; rounded so that a problem's range of costs takes at least
            ``2^30 / (k + 1)`` integers, ``k = max(min(N, M), 3)``, which keeps the value within
            ``range * (k + 1) / 2^30`` of the optimum, per unit of mass. Lossless for float32
            ``1 - cosine`` up to 62 nodes. Shape: ``[B, N, M]``, contiguous, up to 64 nodes a side.
        supply: Shape: ``[B, N]``, contiguous.
        demand: Scaled to supply's total. Shape: ``[B, M]``, contiguous.
        need_flow: Return the flow.
        need_potentials: Return the potentials.
        check: Wait for the device and raise here.

    Raises:
        ImportError: If ``cuda-core`` is not installed.
        RuntimeError: If the device is too old; with ``check``, or for an earlier call, if a problem
            did not reach its optimum.
        ValueError: If a side has more than 64 nodes; with ``check``, or for an earlier call, if a
            value is not valid.
    """
    if not cost.is_cuda:
        raise ValueError(f"cost: expected a CUDA tensor, got one on {cost.device}")
    cuda_core()
    with torch.cuda.device(cost.device):
        return solve_with(
            _launch,
            fault_log(cost.device),
            cost,
            supply,
            demand,
            need_flow=need_flow,
            need_potentials=need_potentials,
            check=check,
        )


def solve_with(
    launch: Launch,
    faults: FaultLog,
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    *,
    need_flow: bool,
    need_potentials: bool,
    check: bool,
) -> TransportPlan:
    """:func:`solve_simplex_cuda` over any way to run the kernel where the tensors are."""
    B, N, M = cost.shape
    if max(N, M) > NODES:
        raise ValueError(
            f"cost: expected at most {NODES} nodes a side for simplex on CUDA, got [B, N, M] = "
            f"{[B, N, M]}; choose solver='sinkhorn' or solver='qp', or pass cpu_round_trip=True"
        )
    faults.raise_if_alarmed()
    value = cost.new_empty(B)
    flow = torch.empty_like(cost) if need_flow else None
    supply_potential = torch.empty_like(supply) if need_potentials else None
    demand_potential = torch.empty_like(demand) if need_potentials else None
    plan = TransportPlan(value, flow, supply_potential, demand_potential)
    if B == 0:
        return plan
    call = faults.register_call((B, N, M))
    tensors = (cost, supply, demand, value, flow, supply_potential, demand_potential)
    arguments = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        ctypes.c_int64(B),
        ctypes.c_int32(N),
        ctypes.c_int32(M),
        ctypes.c_uint64(call),
        faults.first_fault.data_ptr(),
        faults.alarm.data_ptr(),
    )
    launch(Variant.for_shape(cost.dtype, N, M), -(-B // WARPS_PER_BLOCK), arguments)
    if check:
        fault = faults.take()
        if fault is not None and fault.call == call and fault.code != TOO_MANY_PIVOTS:
            raise_fault(fault.problem, cost, supply, demand)
        if fault is not None:
            raise fault.error()
    return plan


class _CurrentStream:
    """Torch's current stream in the protocol that ``cuda.core`` takes."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


_CURRENT_STREAM = _CurrentStream()
_thread = threading.local()


def _launch(variant: Variant, blocks: int, arguments: tuple[object, ...]) -> None:
    """Launch on torch's current device and stream."""
    core = cuda_core()
    index = torch.cuda.current_device()
    if not getattr(_thread, "has_context", False):
        # Torch binds a context to a thread with the thread's first runtime call, which memory from
        # its cache does not need; the driver's launch does.
        core.Device(index).set_current()
        _thread.has_context = True
    kernel = load_kernel(variant, index)
    config = core.LaunchConfig(grid=blocks, block=LANES * WARPS_PER_BLOCK)
    core.launch(_CURRENT_STREAM, config, kernel, *arguments)
