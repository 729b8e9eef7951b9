"""Problems a second of the CUDA simplex, beside the CPU simplex of the same run.

Structured problems: local features with shared parts, cosine costs, cross-reference weights. Every
size is solved with and without flow and potentials, and checked against the CPU's values first.

    python benchmarks/transport_cuda.py --output results/transport_cuda.md
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from emd_retrieval.matching import CrossReferenceWeights
from emd_retrieval.transport import solve
from emd_retrieval.transport.cuda import raise_pending_faults

PARTS, CHANNELS, NOISE = 6, 64, 0.7
Problem = tuple[Tensor, Tensor, Tensor]


def structured_problems(count: int, nodes: int, device: str, seed: int) -> Problem:
    """Pairs of images that see the same parts. Shapes: [B, N, N], [B, N], [B, N]."""
    generator = torch.Generator(device).manual_seed(seed)

    def side() -> Tensor:
        part = torch.randint(PARTS, (count, nodes, 1), generator=generator, device=device)
        seen = parts.gather(1, part.expand(-1, -1, CHANNELS))
        noise = torch.randn(seen.shape, generator=generator, device=device)
        return (seen + NOISE * noise).relu()

    parts = torch.randn(count, PARTS, CHANNELS, generator=generator, device=device)
    query, reference = side(), side()
    supply, demand = CrossReferenceWeights().paired(query, reference)
    unit_query = torch.nn.functional.normalize(query, dim=-1)
    unit_reference = torch.nn.functional.normalize(reference, dim=-1)
    return 1 - unit_query @ unit_reference.mT, supply, demand


def seconds_on_gpu(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call between events on the stream, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def seconds_on_cpu(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_a_small_call(problem: Problem, calls: int = 200) -> float:
    """Wall time of one call out of many in a row, the wait for the device shared by all."""
    solve(*problem)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        solve(*problem)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def measure(nodes: int, arguments: argparse.Namespace) -> list[str]:
    """One row of the table."""
    problem = structured_problems(arguments.batch, nodes, "cuda", arguments.seed)
    some = [part[: arguments.cpu_batch] for part in problem]
    on_cpu = [part.cpu() for part in some]
    expected = solve(*on_cpu).value
    error = (solve(*some, check=True).value.cpu() - expected).abs().max().item()
    if error > 1e-6:
        raise SystemExit(f"{nodes} nodes: CUDA and CPU differ by {error:.2g}")

    full = seconds_on_gpu(lambda: solve(*problem), arguments.repeats)
    value = seconds_on_gpu(
        lambda: solve(*problem, need_flow=False, need_potentials=False), arguments.repeats
    )
    cpu = seconds_on_cpu(lambda: solve(*on_cpu), arguments.repeats)
    small = seconds_a_small_call(tuple(part[:50] for part in problem))  # type: ignore[arg-type]
    raise_pending_faults()
    cpu_rate = len(on_cpu[0]) / cpu
    rates = [arguments.batch / full, arguments.batch / value, cpu_rate]
    return [
        f"{nodes}x{nodes}",
        *(f"{rate / 1e6:.2f}" for rate in rates),
        f"{rates[0] / cpu_rate:.0f}",
        f"{small * 1e6:.0f}",
        f"{error:.1e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[9, 14, 16, 25, 36, 49, 64])
    parser.add_argument("--batch", type=int, default=1 << 17, help="problems a call on the GPU")
    parser.add_argument("--cpu-batch", type=int, default=4096, help="problems a call on the CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the table to this markdown file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and torch sees none")

    header = [
        "nodes",
        "CUDA, full plan (M/s)",
        "CUDA, value only (M/s)",
        f"CPU, full plan, {torch.get_num_threads()} threads (M/s)",
        "CUDA / CPU",
        "50 problems (us a call)",
        "largest difference of values",
    ]
    rows = [header, ["---"] * len(header)]
    rows += [measure(nodes, arguments) for nodes in arguments.nodes]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    told = (
        f"{torch.cuda.get_device_name()}, CPU {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}; float32, "
        f"batch {arguments.batch}, median of {arguments.repeats}, seed {arguments.seed}."
    )
    print(f"{table}\n\n{told}")
    if arguments.output:
        arguments.output.write_text(f"# The CUDA simplex\n\n{table}\n\n{told}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
