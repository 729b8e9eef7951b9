"""The solver in the middle of a busy process: many threads, forks and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import SolvedProblems
from torch import Tensor
from torch.utils.data import DataLoader

from emd_retrieval.transport import emd, lower_bound, solve, solve_top_k

Problem = tuple[Tensor, Tensor, Tensor]
THREADS = 32

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture
def two_native_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def everything(problem: Problem) -> list[Tensor]:
    """What each entry point of the native core gives."""
    cost, supply, demand = (part.clone().requires_grad_() for part in problem)
    value = emd(cost, supply, demand)
    gradients = torch.autograd.grad(value.sum(), (cost, supply, demand))
    plan = solve(*problem)
    as_candidates = tuple(part.unflatten(0, (4, -1)) for part in problem)
    nearest = solve_top_k(*as_candidates, k=3)
    return [
        value.detach(),
        *gradients,
        *(part for part in (plan.value, plan.flow, plan.supply_potential) if part is not None),
        lower_bound(*problem),
        nearest.distance,
        nearest.index,
    ]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_thirty_two_threads_at_once(
    make_problem: Callable[..., Problem], two_native_threads: None
) -> None:
    shapes = [(1, 1), (5, 7), (14, 14), (25, 25), (33, 40), (64, 64), (3, 64), (16, 9)]
    problems = [
        make_problem(N, M, batch=40, weights=kind, seed=N)
        for N, M in shapes
        for kind in ("relu", "equal")
    ]
    expected = [everything(problem) for problem in problems]
    start = threading.Barrier(THREADS)

    def work(number: int) -> bool:
        start.wait()
        turns = range(number, number + len(problems))
        return all(
            equal(everything(problems[k % len(problems)]), expected[k % len(problems)])
            for k in turns
        )

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


def test_faults_in_one_thread_do_not_reach_another(
    make_problem: Callable[..., Problem], two_native_threads: None
) -> None:
    sound, spoilt = make_problem(14, 14, batch=200), make_problem(14, 14, batch=200)
    expected = solve(*sound).value
    spoilt[0][123, 3, 4] = torch.nan

    def work(number: int) -> None:
        for _ in range(10):
            if number % 2:
                with pytest.raises(ValueError, match=r"got nan at \[3, 4\].*problem \[123\]"):
                    solve(*spoilt)
            else:
                assert torch.equal(solve(*sound).value, expected)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def _answer(problem: Problem, connection: Any) -> None:
    connection.send([part.numpy() for part in everything(problem)])


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_other_threads_solve(
    make_problem: Callable[..., Problem], two_native_threads: None
) -> None:
    """The child has none of the threads that were in the middle of a call."""
    problem, busy = make_problem(9, 14, batch=40), make_problem(49, 49, batch=400, weights="equal")
    expected = everything(problem)
    stop = threading.Event()

    def keep_solving() -> None:
        while not stop.is_set():
            solve(*busy)

    others = [threading.Thread(target=keep_solving) for _ in range(3)]
    for other in others:
        other.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(5):
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=_answer, args=(problem, there))
            child.start()
            assert here.poll(60), "the child did not answer"
            assert equal([torch.from_numpy(part) for part in here.recv()], expected)
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        for other in others:
            other.join()


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_workers_of_a_data_loader(
    method: str, make_problem: Callable[..., Problem], two_native_threads: None
) -> None:
    """Solved here first, so that a forked worker is the copy of a process that has solved."""
    solved = SolvedProblems([make_problem(9, 14, batch=40, seed=seed) for seed in range(4)])
    expected = [solved[number] for number in range(len(solved))]
    loader = DataLoader(solved, batch_size=None, num_workers=2, multiprocessing_context=method)
    for got, want in zip(loader, expected, strict=True):
        assert equal(got, want)


INTERRUPTED = """
import signal, sys, torch
# A shell that starts jobs in the background has them ignore Ctrl-C, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)
from emd_retrieval.transport import lower_bound, solve, solve_top_k

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
cost = torch.rand(2000, 25, 25, generator=generator)
equal = torch.full((2000, 25), 1 / 25)
expected = solve(cost, equal, equal).value
large = cost.repeat(200, 1, 1), equal.repeat(200, 1)
call = {
    "solve": lambda: solve(large[0], large[1], large[1], need_flow=False),
    "top_k": lambda: solve_top_k(large[0][None], large[1][None], large[1][None], k=400_000),
}[sys.argv[1]]
for _ in range(int(sys.argv[2])):
    try:
        print("started", flush=True)
        while True:
            call()
    except KeyboardInterrupt:
        print("stopped", flush=True)
        assert torch.equal(solve(cost, equal, equal).value, expected)
print("as before", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
@pytest.mark.parametrize("call", ["solve", "top_k"])
def test_ctrl_c_stops_within_a_second_and_spoils_nothing(call: str) -> None:
    times = 3
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", INTERRUPTED, call, str(times)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    seconds = []
    try:
        for _ in range(times):
            assert child.stdout.readline() == "started\n"
            time.sleep(0.3)  # well into the native call
            start = time.monotonic()
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "stopped\n"
            seconds.append(time.monotonic() - start)
        out, _ = child.communicate(timeout=120)
    finally:
        child.kill()
    assert out == "as before\n"
    assert child.returncode == 0
    # On a busy machine one of them may wait for its turn, and the sanitizers take their time.
    assert min(seconds) < (10 if "asan" in os.environ.get("LD_PRELOAD", "") else 1), seconds
