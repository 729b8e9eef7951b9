# The compiled solver, built from native/; module.cpp defines these names.
from typing import Any

import numpy as np
import numpy.typing as npt

_Reals = npt.NDArray[np.floating[Any]]
_Report = tuple[str | None, int, int]

MAX_NODES: int

def instruction_sets() -> list[str]: ...
def solve(
    cost: _Reals,
    supply: _Reals,
    demand: _Reals,
    value: _Reals,
    flow: _Reals | None,
    supply_potential: _Reals | None,
    demand_potential: _Reals | None,
    most_pivots: int,
    threads: int,
    instruction_set: str | None,
) -> _Report: ...
def lower_bound(
    cost: _Reals,
    supply: _Reals,
    demand: _Reals,
    bound: _Reals,
    threads: int,
    instruction_set: str | None,
) -> _Report: ...
def top_k(
    cost: _Reals,
    supply: _Reals,
    demand: _Reals,
    mass: _Reals,
    distance: _Reals,
    index: npt.NDArray[np.int64],
    solved: npt.NDArray[np.int64],
    most_pivots: int,
    threads: int,
    instruction_set: str | None,
) -> _Report: ...
def add_flow_products(
    flow: _Reals,
    scale: _Reals,
    left: _Reals,
    right: _Reals,
    left_gradient: _Reals | None,
    right_gradient: _Reals | None,
    upper: bool,
    threads: int,
) -> None: ...
