# The compiled problem writer, built from native/; module.cpp defines these names.
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Integers = npt.NDArray[np.int64]

def instruction_sets() -> list[str]: ...
def write_problems(
    queries: _Floats,
    codes: npt.NDArray[Any],
    scales: _Floats | None,
    counts: _Integers | None,
    rows: _Integers,
    shifts: _Floats | None,
    uniform: bool,
    floor: float,
    relative_floor: bool,
    absent_cost: float,
    cost: _Floats,
    stored_weights: _Floats,
    query_weights: _Floats,
    threads: int,
    instruction_set: str | None,
) -> None: ...
def write_problems_from_files(
    queries: _Floats,
    files: _Integers,
    offsets: _Integers,
    codec: str,
    rows: _Integers,
    shifts: _Floats | None,
    uniform: bool,
    floor: float,
    relative_floor: bool,
    absent_cost: float,
    cost: _Floats,
    stored_weights: _Floats,
    query_weights: _Floats,
    threads: int,
    instruction_set: str | None,
) -> bool: ...
def nearest_from_files(
    queries: _Floats,
    files: _Integers,
    offsets: _Integers,
    codec: str,
    nodes: int,
    rows: _Integers,
    shifts: _Floats | None,
    uniform: bool,
    floor: float,
    relative_floor: bool,
    absent_cost: float,
    distance: _Floats,
    index: _Integers,
    solved: _Integers,
    most_pivots: int,
    threads: int,
) -> bool: ...
def read_rows(
    file: int,
    starts: _Integers,
    lengths: _Integers | None,
    to: npt.NDArray[np.uint8],
    threads: int,
) -> tuple[int, int]: ...
