"""Table 6 of the paper: the time of the whole EMD layer in a 5-way 1-shot task with 10 queries.

The layer is everything between features and similarities: cosine costs, cross-reference weights,
the transport problems; forward, and forward with backward to the features. The paper's "10 query
images" are 50 problems if they are all the queries, 250 if they are ten a class: both are measured.
Its printed times stand beside what QPTH and OpenCV take in the same run, where they are installed.

    python benchmarks/table6.py --output results/table6.md
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from emd_retrieval._files import write_text
from emd_retrieval.progress import progress_counter
from emd_retrieval.records import ResultRecord
from emd_retrieval.transport import emd

WAYS, PARTS = 5, 8
QUERIES = (10, 50)
"""Query images: all of them, or ten a class."""

PAPER = {
    "QPTH": {
        (3, 256): 0.294, (3, 512): 0.294, (3, 1024): 0.295, (3, 2048): 0.295,
        (4, 256): 1.489, (4, 512): 1.493, (4, 1024): 1.498, (4, 2048): 1.499,
        (5, 256): 8.595, (5, 512): 8.638, (5, 1024): 8.638, (5, 2048): 8.650,
    },
    "OpenCV": {(5, 256): 0.018, (5, 512): 0.019, (5, 1024): 0.021, (5, 2048): 0.025},
}  # fmt: skip
"""Seconds as printed, by side of the feature map and channels."""

Value = Callable[[Tensor, Tensor, Tensor], Tensor]


def task(queries: int, side: int, channels: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Support and query features that share the parts of their class.

    Shape:
        ``[5, side**2, channels]``, ``[queries, side**2, channels]``.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(WAYS, PARTS, channels, generator=generator)

    def image(label: int) -> Tensor:
        cells = parts[label, torch.randint(PARTS, (side**2,), generator=generator)]
        return (cells + 0.7 * torch.randn(cells.shape, generator=generator)).relu()

    support = torch.stack([image(label) for label in range(WAYS)])
    query = torch.stack([image(index % WAYS) for index in range(queries)])
    return support.to(device), query.to(device)


def emd_layer(query: Tensor, support: Tensor, value: Value) -> Tensor:
    """Similarity of every query with every class (Equations 2, 3, 11): ``[queries, 5]``."""
    unit_query = torch.nn.functional.normalize(query, dim=-1)
    unit_support = torch.nn.functional.normalize(support, dim=-1)
    cost = 1 - torch.einsum("qnd,smd->qsnm", unit_query, unit_support)
    supply = weights(torch.einsum("qnd,sd->qsn", query, support.mean(1)))
    demand = weights(torch.einsum("smd,qd->qsm", support, query.mean(1)))
    return 1 - value(cost, supply, demand) / query.shape[1]


def weights(relevance: Tensor) -> Tensor:
    """Cross-reference weights as in the authors' code: floored, as much mass as there are nodes."""
    floored = relevance.relu() + 1e-3
    return floored * (floored.shape[-1] / floored.sum(-1, keepdim=True))


def qpth_value(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """The paper's training solver in the form of the authors' code: L2, strength 1e-6, float64."""
    layer = importlib.import_module("qpth.qp")
    leading, (N, M) = cost.shape[:-2], cost.shape[-2:]
    cost = cost.double().reshape(-1, N * M)
    supply, demand = supply.double().reshape(-1, N), demand.double().reshape(-1, M)
    demand = demand * (supply.sum(1, keepdim=True) / demand.sum(1, keepdim=True))
    identity = torch.eye(N * M, dtype=cost.dtype, device=cost.device)
    ones = cost.new_ones(1, max(N, M))
    A = torch.cat(
        [
            torch.kron(torch.eye(N).to(cost), ones[:, :M]),
            torch.kron(ones[:, :N], torch.eye(M).to(cost)),
        ]
    )
    # A has rank N + M - 1: the last row follows from the others.
    b = torch.cat([supply, demand], 1)
    solve = layer.QPFunction(verbose=-1)
    flow = solve(1e-6 * identity, cost, -identity, cost.new_zeros(N * M), A[:-1], b[:, :-1])
    value: Tensor = (cost * flow).sum(1)
    return value.reshape(leading)


def solved_by(solver: str) -> Value:
    # The round trip is OpenCV's on a GPU; the others run where the features are.
    trip = solver == "opencv"
    return lambda *problem: emd(*problem, solver=solver, cpu_round_trip=trip)


@dataclass(frozen=True)
class Contender:
    """A solver of the table.

    Attributes:
        name: As the table calls it.
        requires: The module without which it is left out.
        value: The transport value of ``[queries, 5]`` problems.
        trains: It has a backward pass to the weights.
    """

    name: str
    requires: str
    value: Value
    trains: bool = True


QPTH = Contender("QPTH", "qpth.qp", qpth_value)
CONTENDERS = (
    QPTH,
    Contender("OpenCV", "cv2", solved_by("opencv"), trains=False),
    Contender("qp (ours)", "emd_retrieval.transport.qp", solved_by("qp")),
    Contender("simplex (ours)", "emd_retrieval.transport._native", solved_by("simplex")),
)


def is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def seconds(query: Tensor, support: Tensor, value: Value, *, backward: bool) -> float:
    """Wall time of the layer, up to the last kernel where there is a GPU."""

    def wait() -> None:
        if query.is_cuda:
            torch.cuda.synchronize(query.device)

    query, support = (x.detach().requires_grad_(backward) for x in (query, support))
    wait()
    start = time.perf_counter()
    similarity = emd_layer(query, support, value)
    if backward:
        torch.autograd.backward(similarity.sum())
    wait()
    return time.perf_counter() - start


def column(queries: int, backward: bool) -> str:
    return f"{queries * WAYS} problems, {'with backward' if backward else 'forward'} (s)"


def measure_cell(
    side: int, channels: int, contenders: list[Contender], arguments: argparse.Namespace
) -> tuple[list[dict[str, object]], float]:
    """Rows of one size and dimension, and by how much the similarities differ at most."""
    rows: dict[str, dict[str, object]] = {
        contender.name: {
            "Solver": contender.name,
            "Spatial size": f"{side} x {side}",
            "Dimension": channels,
            "Printed in the paper (s)": PAPER.get(contender.name, {}).get((side, channels)),
        }
        for contender in contenders
    }
    difference = 0.0
    for queries in QUERIES:
        support, query = task(queries, side, channels, arguments.device, arguments.seed)
        todo = [x for x in contenders if x is not QPTH or queries == min(QUERIES)]
        with torch.no_grad():
            similarities = [emd_layer(query, support, x.value).double().cpu() for x in todo]
        difference = max(
            difference, *(float((x - similarities[-1]).abs().max()) for x in similarities)
        )
        times: dict[tuple[str, bool], list[float]] = {}
        # In turns, so that whatever else the machine does hits every solver alike.
        for repeat in range(arguments.repeats):
            for contender in todo:
                if contender is QPTH and repeat:
                    continue
                for backward in (False, True) if contender.trains else (False,):
                    took = seconds(query, support, contender.value, backward=backward)
                    times.setdefault((contender.name, backward), []).append(took)
        for (name, backward), taken in times.items():
            rows[name][column(queries, backward)] = min(taken)
    return list(rows.values()), difference


def against_print(table: pd.DataFrame) -> pd.DataFrame:
    """How many times faster than the printed times our forward passes are."""
    rows = []
    for row in table[table["Solver"].str.contains("ours")].to_dict("records"):
        entry = {name: row[name] for name in ("Solver", "Spatial size", "Dimension")}
        for queries in QUERIES:
            for name, printed in PAPER.items():
                then = printed.get((int(row["Spatial size"][0]), row["Dimension"]))
                ratio = None if then is None else then / row[column(queries, backward=False)]
                entry[f"{name} printed / {queries * WAYS} problems"] = ratio
        rows.append(entry)
    return pd.DataFrame(rows)


def laid_out(table: pd.DataFrame) -> pd.DataFrame:
    """Four significant digits, and a dash where nothing was printed or measured."""

    def cell(value: object) -> object:
        if not isinstance(value, float):
            return "-" if value is None else value
        return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.4g}"

    return table.map(cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--channels", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=7, help="the fastest of these counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the table to this markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    contenders = [x for x in CONTENDERS if is_installed(x.requires)]
    rows: list[dict[str, object]] = []
    difference = 0.0
    cells = [(side, channels) for side in arguments.sides for channels in arguments.channels]
    with progress_counter("Table 6", total=len(cells), unit="cell") as bar:
        for side, channels in cells:
            # The dimension hardly matters to a solver, and QPTH takes half a minute a call.
            some = [x for x in contenders if x is not QPTH or channels == max(arguments.channels)]
            more, gap = measure_cell(side, channels, some, arguments)
            rows += more
            difference = max(difference, gap)
            bar.update()
    names = [x.name for x in CONTENDERS]
    rows.sort(key=lambda row: names.index(str(row["Solver"])))
    taken = [column(queries, backward) for queries in QUERIES for backward in (False, True)]
    facts = ["Solver", "Spatial size", "Dimension", "Printed in the paper (s)"]
    table = pd.DataFrame(rows, columns=[*facts, *taken])
    missing = [x.name for x in CONTENDERS if x not in contenders]
    record = ResultRecord(
        name="table6",
        title="Table 6: time of the EMD layer, 5-way 1-shot, 10 query images",
        tables={
            "Time of the layer": laid_out(table),
            "Against the printed times": laid_out(against_print(table)),
        },
        settings={
            "repeats": arguments.repeats,
            "threads": arguments.threads,
            "device": arguments.device,
        },
        data={"features": "random, eight parts a class, rectified", "ways": WAYS},
        seed=arguments.seed,
        notes=(
            "The layer is cosine costs, cross-reference weights and the transport problems. Ten "
            "query images make 50 problems, ten a class 250; the paper does not say which it timed "
            "or on what hardware.",
            "QPTH is measured once, on 50 problems and the largest dimension; OpenCV has no "
            "gradient. The others: fastest of the repeats, taken in turns.",
            f"Similarities of all solvers agree to {difference:.1e}."
            + (f" Not installed here: {', '.join(missing)}." if missing else ""),
        ),
    )
    text = record.to_markdown()
    print(text)
    if arguments.output:
        write_text(arguments.output, text)


if __name__ == "__main__":
    main()
