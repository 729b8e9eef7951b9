"""Faults that the kernel finds: kept on the device, raised when the host reads.

The kernel notes the first bad problem of the earliest call in device memory and rings an alarm in
pinned host memory. So a launch waits for nothing, and a later one still learns of the fault.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from emd_retrieval.transport.cuda.kernel import PIVOT_LIMIT
from emd_retrieval.transport.problem import BALANCE_TOLERANCE

TOO_MANY_PIVOTS = 8
"""The kernel's number for a problem that did not reach its optimum; below it, values are bad."""

_WORDS = {
    1: "cost: expected finite values that leave their dtype room for sums, got others",
    2: "supply: expected finite weights of zero or more, got others",
    3: "demand: expected finite weights of zero or more, got others",
    4: "supply: expected a positive total, got zero",
    5: "demand: expected a positive total, got zero",
    6: f"supply, demand: expected totals equal to {BALANCE_TOLERANCE:g} relatively, got others "
    "(scale both to one total, or pass partial=True)",
    7: "cost, supply: expected costs whose product with the mass their dtype holds, got others",
    TOO_MANY_PIVOTS: f"simplex: expected the optimum within {PIVOT_LIMIT} pivots, got none",
}

# The kernel's word: the call in 24 bits, the problem in 36, the code in 4. All ones: no fault.
_NONE = (1 << 64) - 1
_CALLS = 1 << 24
_SHAPES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Fault:
    """One faulty problem.

    Attributes:
        call: The call that it came with.
        problem: Its index in that call's flat batch.
        code: The kernel's number for what is wrong.
        shape: ``(B, N, M)`` of the call; ``None`` if it was too long ago.
    """

    call: int
    problem: int
    code: int
    shape: tuple[int, int, int] | None

    def error(self) -> Exception:
        """The exception that says so without a look at the values, which may be gone."""
        told = "" if self.shape is None else f" with cost [B, N, M] = {list(self.shape)}"
        message = (
            f"{_WORDS[self.code]}; found on the device in problem {self.problem} of a call{told}"
        )
        return RuntimeError(message) if self.code == TOO_MANY_PIVOTS else ValueError(message)


class FaultLog:
    """The fault words of one device.

    Args:
        device: Where the kernels run.

    Attributes:
        first_fault: What the kernels minimise into. Shape: ``[1]``, int64 on the device.
        alarm: What they set beside it. Shape: ``[1]``, int32 in (pinned) host memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_fault = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.alarm = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._alarm = self.alarm.numpy()
        self._synchronize()  # the first kernel may come on another stream than this fill
        self._shapes: dict[int, tuple[int, int, int]] = {}
        self._call = 0
        self._lock = threading.Lock()

    def register_call(self, shape: tuple[int, int, int]) -> int:
        """The number of a new call that solves ``shape = (B, N, M)``."""
        with self._lock:
            self._call = call = (self._call + 1) % _CALLS
            self._shapes[call] = shape
            if len(self._shapes) > _SHAPES_KEPT:
                del self._shapes[next(iter(self._shapes))]
            return call

    def raise_if_alarmed(self) -> None:
        """Raise what the alarm stands for, if it rang; waits for the device only then."""
        if self._alarm[0]:
            self.raise_pending()

    def raise_pending(self) -> None:
        """Wait for the device and raise the first fault since the last time, if there is one."""
        self._synchronize()
        fault = self.take()
        if fault is not None:
            raise fault.error()

    def take(self) -> Fault | None:
        """Wait for the current stream; the first fault since the last time, which is forgotten."""
        if self._read() == _NONE:
            return None
        with self._lock:
            self._synchronize()  # no kernel of another stream may add to what is cleared below
            word = self._read()
            self.first_fault.fill_(-1)
            self.alarm.zero_()
            self._synchronize()
            if word == _NONE:  # another thread was here first
                return None
            call = word >> 40
            return Fault(call, word >> 4 & (1 << 36) - 1, word & 15, self._shapes.get(call))

    def _read(self) -> int:
        return int(self.first_fault) & _NONE

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


_logs: dict[int, FaultLog] = {}
_logs_lock = threading.Lock()


def fault_log(device: torch.device) -> FaultLog:
    """The log of a CUDA device, made on first use."""
    index = torch.cuda.current_device() if device.index is None else device.index
    log = _logs.get(index)
    if log is None:
        with _logs_lock:
            log = _logs.setdefault(index, FaultLog(torch.device("cuda", index)))
    return log


def raise_pending_faults(device: torch.device | str | int | None = None) -> None:
    """Wait for the CUDA simplex and raise the first fault that it has found and not yet raised.

    ``solve`` and ``emd`` do not wait for a CUDA device: a problem with bad values gets NaN for an
    answer, and its fault is raised here or by a later call, whichever comes first. Call this where
    results are read on the host anyway. Where nothing was solved on CUDA it does nothing.

    Args:
        device: Which CUDA device; all that were used if not given.

    Raises:
        ValueError: If a problem had values that no solver can take; it names the argument, the
            problem's index in the flat batch, and the shape.
        RuntimeError: If a problem did not reach its optimum.
    """
    wanted = None
    if device is not None:
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if place.type != "cuda":
            raise ValueError(f"device: expected a CUDA device, got {place}")
        wanted = torch.cuda.current_device() if place.index is None else place.index
    for index, log in list(_logs.items()):
        if wanted in (None, index):
            log.raise_pending()
