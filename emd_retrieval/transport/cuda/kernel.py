"""The kernel's source, its variants, and their compilation through NVRTC by ``cuda.core``.

Nothing here touches tensors, and only :func:`load_kernel` needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from typing import Any

import torch

from emd_retrieval.transport.problem import BALANCE_TOLERANCE

NODES = 64
"""Most nodes a side."""

LANES = 32
WARPS_PER_BLOCK = 2
"""Problems a block."""

PIVOT_LIMIT = 20000
"""More pivots than this are a fault; a hundred are many."""

MACROS = {
    "WARPS_PER_BLOCK": str(WARPS_PER_BLOCK),
    "PIVOT_LIMIT": str(PIVOT_LIMIT),
    "BALANCE_TOLERANCE": repr(BALANCE_TOLERANCE),
}
"""What the source takes from here."""

INSTALL_HINT = (
    "solver='simplex' on CUDA tensors needs the package cuda-core: "
    'pip install "emd_retrieval[gpu]". '
    "Without it choose solver='sinkhorn' or solver='qp', which run on the device in torch, "
    "or pass cpu_round_trip=True to solve on the CPU and copy back."
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One instance of the kernel template.

    Attributes:
        real: The C++ type of costs, weights and results.
        row_capacity: Suppliers it has registers for, a multiple of four.
        column_tiles: Columns a lane.
    """

    real: str
    row_capacity: int
    column_tiles: int

    @classmethod
    def for_shape(cls, dtype: torch.dtype, N: int, M: int) -> Variant:
        """The smallest variant for problems of ``N`` suppliers and ``M`` demanders."""
        real = {torch.float32: "float", torch.float64: "double"}[dtype]
        return cls(real, -(-N // 4) * 4, -(-M // LANES))

    @property
    def name(self) -> str:
        """The C++ expression that instantiates it."""
        return f"network_simplex<{self.real}, {self.row_capacity}, {self.column_tiles}>"


@cache
def source() -> str:
    """The CUDA C++ source."""
    return resources.files(__package__).joinpath("network_simplex.cu").read_text(encoding="utf-8")


@cache
def cuda_core() -> Any:
    """The module that holds ``Program``, ``launch`` and the rest of ``cuda.core``.

    Raises:
        ImportError: If ``cuda-core`` is not installed; the message names what to install and what
            else solves on the device.
    """
    try:
        core = import_module("cuda.core")
        # Releases before 0.5 keep everything in the experimental namespace.
        return core if hasattr(core, "Program") else import_module("cuda.core.experimental")
    except ImportError as error:
        raise ImportError(f"{INSTALL_HINT} ({error})") from error


@cache
def compile_kernel(variant: Variant, architecture: str) -> Any:
    """Compile ``variant`` for ``architecture`` (such as ``"sm_90"``), once a process: about .6 s.

    Returns:
        The ``cuda.core`` object code; its kernel is called :attr:`Variant.name`.
    """
    core = cuda_core()
    options = core.ProgramOptions(std="c++17", arch=architecture, define_macro=list(MACROS.items()))
    program = core.Program(source(), "c++", options)
    return program.compile("cubin", name_expressions=(variant.name,))


@cache
def load_kernel(variant: Variant, device_index: int) -> Any:
    """The ``cuda.core`` kernel of ``variant`` on a device whose context is current.

    Raises:
        RuntimeError: If the device is older than the kernel's instructions.
    """
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8:
        raise RuntimeError(
            f"solver='simplex' on CUDA needs compute capability 8.0 or later, and "
            f"{torch.cuda.get_device_name(device_index)} has {major}.{minor}; choose "
            "solver='sinkhorn' or solver='qp', or pass cpu_round_trip=True"
        )
    return compile_kernel(variant, f"sm_{major}{minor}").get_kernel(variant.name)
