"""The CUDA simplex: under the warp emulator, compiled for GPUs that are not here, and on a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emd_retrieval.transport import TransportPlan, emd, solve
from emd_retrieval.transport.cuda import kernel, raise_pending_faults, solve_simplex_cuda
from emd_retrieval.transport.cuda.faults import FaultLog
from emd_retrieval.transport.cuda.kernel import MACROS, Variant
from emd_retrieval.transport.cuda.launcher import solve_with

Problem = tuple[Tensor, Tensor, Tensor]

EMULATOR = Path(__file__).parent / "warp_emulator"
SOURCE = Path(kernel.__file__).parent / "network_simplex.cu"
VARIANTS = [
    *(Variant("float", *size) for size in [(4, 1), (16, 1), (28, 1), (32, 1), (64, 1)]),
    *(Variant("float", *size) for size in [(16, 2), (36, 2), (52, 2), (64, 2)]),
    *(Variant("double", *size) for size in [(16, 1), (28, 1), (64, 2)]),
]
SIZES = [(14, 14), (25, 25), (32, 32), (33, 31), (31, 33), (49, 49), (64, 64), (64, 5), (3, 64)]

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU at hand"),
]


def compile_for_host(source: Path, library: Path, macros: dict[str, str]) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler at hand to build the warp emulator")
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    flags += [f"-D{name}={value}" for name, value in macros.items()]
    command = [*compiler.split(), *flags, "-o", str(library), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(library))


class Emulator:
    """Runs the kernel where there is no GPU, as :func:`solve_simplex_cuda` does where there is."""

    def __init__(self, folder: Path, variants: list[Variant], **macros: str) -> None:
        names = [f"VARIANT({v.real}, {v.row_capacity}, {v.column_tiles})" for v in variants]
        self.variants = variants
        self.library = compile_for_host(
            EMULATOR / "emulate.cpp",
            folder / "emulator.so",
            {**MACROS, "KERNEL": f'"{SOURCE}"', "VARIANTS": " ".join(names), **macros},
        )
        self.library.emulator_report.restype = ctypes.c_char_p
        self.library.emulator_arrivals.restype = ctypes.c_long
        self.faults = FaultLog(torch.device("cpu"))
        self.lane_order = 0

    def launch(self, variant: Variant, blocks: int, arguments: tuple[object, ...]) -> None:
        """The smallest variant built that holds the wanted one stands in for it."""
        fits = min(
            (v.row_capacity, v.column_tiles)
            for v in self.variants
            if v.real == variant.real
            and v.row_capacity >= variant.row_capacity
            and v.column_tiles >= variant.column_tiles
        )
        # Pointers are bare integers here as they are for cuda.core, the rest is typed.
        fields = [
            (f"field{i}", ctypes.c_void_p if isinstance(argument, int) else type(argument))
            for i, argument in enumerate(arguments)
        ]
        struct = type("Arguments", (ctypes.Structure,), {"_fields_": fields})(*arguments)
        status = self.library.emulate(
            variant.real.encode(),
            *fits,
            blocks,
            ctypes.c_uint64(self.lane_order),
            ctypes.byref(struct),
        )
        assert status == 0, self.library.emulator_report().decode() or f"{variant} is not built"

    def solve(
        self,
        problem: Problem,
        *,
        need_flow: bool = True,
        need_potentials: bool = True,
        check: bool = True,
    ) -> TransportPlan:
        return solve_with(
            self.launch,
            self.faults,
            *problem,
            need_flow=need_flow,
            need_potentials=need_potentials,
            check=check,
        )


@pytest.fixture(scope="session")
def built_emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("warp_emulator"), VARIANTS)


@pytest.fixture
def emulator(built_emulator: Emulator) -> Emulator:
    built_emulator.faults = FaultLog(torch.device("cpu"))
    built_emulator.lane_order = 0
    return built_emulator


def same_plans(one: TransportPlan, other: TransportPlan) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("value", "flow", "supply_potential", "demand_potential")
    )


# The kernel under the emulator.


def test_every_kind(
    emulator: Emulator,
    every_kind: list[tuple[str, Problem, Tensor]],
    certify: Callable[..., None],
    unit: Callable[..., Tensor],
) -> None:
    for name, problem, value in every_kind:
        plan = emulator.solve(problem)
        assert ((plan.value.double() - value).abs() <= 1e-6 * unit(*problem)).all(), name
        certify(problem, plan)


@pytest.mark.parametrize(("N", "M"), SIZES)
@pytest.mark.parametrize("weights", ["relu", "equal", "zeros", "one_hot"])
def test_sizes(
    emulator: Emulator,
    make_problem: Callable[..., Problem],
    certify: Callable[..., None],
    N: int,
    M: int,
    weights: str,
) -> None:
    for cost in ("cosine", "quantised", "constant"):
        problem = make_problem(N, M, batch=2, weights=weights, cost=cost, seed=N + M)
        certify(problem, emulator.solve(problem))


def test_random_shapes(
    emulator: Emulator, make_problem: Callable[..., Problem], certify: Callable[..., None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(150):
        N, M = (int(n) for n in torch.randint(1, 65, (2,), generator=generator))
        problem = make_problem(N, M, batch=1, weights="lognormal", cost="huge", seed=seed)
        certify(problem, emulator.solve(problem))


@pytest.mark.parametrize(("N", "M"), [(1, 1), (14, 9), (25, 25), (49, 64)])
@pytest.mark.parametrize("cost", ["cosine", "negative", "huge", "tiny", "duplicated"])
def test_double_precision(
    emulator: Emulator,
    make_problem: Callable[..., Problem],
    certify: Callable[..., None],
    oracle: Callable[..., Tensor],
    cost: str,
    N: int,
    M: int,
) -> None:
    problem = make_problem(N, M, batch=2, cost=cost, dtype=torch.float64)
    plan = emulator.solve(problem)
    certify(problem, plan, tolerance=2e-7)
    spread = problem[0].amax((1, 2)) - problem[0].amin((1, 2))
    # The documented bound, and as much again for the oracle's own tolerance.
    bound = spread * (max(min(N, M), 3) + 1) / 2**30 + 1e-9 * problem[0].abs().amax((1, 2))
    assert ((plan.value - oracle(*problem)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("scale", "offset"), [(2.2e307, 0.0), (1e-300, 0.0), (1e-318, 0.0), (1.0, 1e9)]
)
def test_extreme_costs(
    emulator: Emulator, make_problem: Callable[..., Problem], scale: float, offset: float
) -> None:
    cost, supply, demand = make_problem(14, 14, dtype=torch.float64)
    low, high = cost.amin((1, 2), True), cost.amax((1, 2), True)
    cost = (cost - low) / (high - low) * 2 - 1  # costs as large as may be
    plain = emulator.solve((cost, supply, demand))
    plan = emulator.solve((cost * scale + offset, supply, demand))
    assert plan.flow is not None
    assert torch.isfinite(plan.value).all()
    # At 1e-318 a double holds 18 bits of a cost; 1e9 leaves it 23 after the point.
    tolerance = 1e-4 if scale < 1e-310 else 1e-6
    achieved = (plan.flow * cost).sum((1, 2))
    torch.testing.assert_close(achieved, plain.value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_weights(
    emulator: Emulator, make_problem: Callable[..., Problem], scale: float
) -> None:
    cost, supply, demand = make_problem(14, 25)
    plain = emulator.solve((cost, supply, demand))
    plan = emulator.solve((cost, supply * scale, demand * scale))
    torch.testing.assert_close(plan.value / scale, plain.value, rtol=1e-5, atol=0)
    torch.testing.assert_close(plan.supply_potential, plain.supply_potential, rtol=0, atol=1e-6)


def test_totals_within_tolerance_are_rescaled(
    emulator: Emulator, make_problem: Callable[..., Problem]
) -> None:
    cost, supply, demand = make_problem(9, 12)
    plain = emulator.solve((cost, supply, demand))
    plan = emulator.solve((cost, supply, demand * (1 + 5e-5)))
    assert plan.flow is not None
    torch.testing.assert_close(plan.flow.sum(2), supply)
    torch.testing.assert_close(plan.value, plain.value, rtol=1e-5, atol=0)


def test_a_set_with_itself_costs_nothing(emulator: Emulator) -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = torch.nn.functional.normalize(torch.randn(4, 25, 8, generator=generator), dim=-1)
    weights = torch.rand(4, 25, generator=generator) + 0.1
    cost = torch.cdist(nodes, nodes, compute_mode="donot_use_mm_for_euclid_dist")
    plan = emulator.solve((cost, weights, weights))
    assert torch.equal(plan.value, torch.zeros(4))
    torch.testing.assert_close(plan.flow, torch.diag_embed(weights))


@pytest.mark.parametrize(("N", "M"), [(14, 14), (25, 25), (20, 40), (64, 64)])
def test_lanes_take_turns_in_any_order(
    emulator: Emulator, make_problem: Callable[..., Problem], N: int, M: int
) -> None:
    problem = make_problem(N, M, cost="quantised")
    plan = emulator.solve(problem)
    for emulator.lane_order in range(1, 5):
        assert same_plans(plan, emulator.solve(problem))


def test_batch_equals_single_problems(
    emulator: Emulator, make_problem: Callable[..., Problem]
) -> None:
    problem = make_problem(14, 10, batch=7)
    together = emulator.solve(problem)
    for k in range(7):
        cost, supply, demand = (part[k : k + 1].clone() for part in problem)
        alone = emulator.solve((cost, supply, demand))
        assert torch.equal(alone.value, together.value[k : k + 1])
        assert together.flow is not None
        assert torch.equal(alone.flow, together.flow[k : k + 1])


def test_only_what_is_needed(emulator: Emulator, make_problem: Callable[..., Problem]) -> None:
    problem = make_problem(14, 33)
    full = emulator.solve(problem)
    bare = emulator.solve(problem, need_flow=False, need_potentials=False)
    assert bare.flow is None
    assert bare.supply_potential is None
    assert bare.demand_potential is None
    assert torch.equal(bare.value, full.value)
    assert emulator.solve(problem, need_potentials=False).demand_potential is None
    assert torch.equal(
        emulator.solve(problem, need_flow=False).supply_potential, full.supply_potential
    )


def test_start_basis_saves_pivots(emulator: Emulator, make_problem: Callable[..., Problem]) -> None:
    lines = SOURCE.read_text().splitlines()
    entering = next(
        i for i, text in enumerate(lines, 1) if "reduce_min_sync(ALL_LANES, least)" in text
    )
    emulator.solve(make_problem(25, 25, batch=20))
    pivots = emulator.library.emulator_arrivals(entering) / 20 - 1
    # About 22; a start basis that ignores the costs takes over a hundred.
    assert 10 < pivots < 30


# Faults.


def spoilt(problem: Problem, kind: str, *problems: int) -> Problem:
    cost, supply, demand = (part.clone() for part in problem)
    for k in problems:
        match kind:
            case "cost NaN":
                cost[k, 1, 2] = torch.nan
            case "cost infinite":
                cost[k, -1, -1] = -torch.inf
            case "cost too large":
                cost[k, 0, 1] = -torch.finfo(cost.dtype).max / 4
            case "value too large":
                cost[k] = torch.finfo(cost.dtype).max / 16
                supply[k] *= 18
                demand[k] *= 18
            case "supply negative":
                supply[k, 3] = -1e-3
            case "supply infinite":
                supply[k, 3] = torch.inf
            case "demand NaN":
                demand[k, 0] = torch.nan
            case "supply zero":
                supply[k] = 0
            case "demand zero":
                demand[k] = 0
            case "unequal":
                demand[k] *= 1.001
    return cost, supply, demand


FAULTS = [
    ("cost NaN", "cost: expected finite"),
    ("cost infinite", "cost: expected finite"),
    ("cost too large", "cost: expected"),
    ("value too large", "cost, supply: expected costs whose product with the mass"),
    ("supply negative", "supply: expected finite weights of zero or more"),
    ("supply infinite", "supply: expected finite weights of zero or more"),
    ("demand NaN", "demand: expected finite weights of zero or more"),
    ("supply zero", "supply: expected a positive total"),
    ("demand zero", "demand: expected a positive total"),
    ("unequal", "supply, demand: expected totals equal"),
]


@pytest.mark.parametrize(("kind", "words"), FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fault_at_once(
    emulator: Emulator,
    make_problem: Callable[..., Problem],
    kind: str,
    words: str,
    dtype: torch.dtype,
) -> None:
    problem = make_problem(14, 9, batch=9, dtype=dtype)
    with pytest.raises(ValueError, match=f"{words}.*problem \\[4\\] of leading shape \\[9\\]"):
        emulator.solve(spoilt(problem, kind, 7, 4))
    emulator.solve(problem)


@pytest.mark.parametrize(("kind", "words"), FAULTS)
def test_fault_later(
    emulator: Emulator, make_problem: Callable[..., Problem], kind: str, words: str
) -> None:
    problem = make_problem(9, 40, batch=6)
    good = emulator.solve(problem)
    plan = emulator.solve(spoilt(problem, kind, 2, 5), check=False)
    bad = torch.tensor([k in (2, 5) for k in range(6)])
    assert torch.equal(torch.isnan(plan.value), bad)
    for part, right in (
        (plan.flow, good.flow),
        (plan.supply_potential, good.supply_potential),
        (plan.demand_potential, good.demand_potential),
    ):
        assert part is not None
        assert right is not None
        assert torch.isnan(part[bad]).all()
        assert torch.equal(part[~bad], right[~bad])
    with pytest.raises(ValueError, match=f"{words}.*problem 2 of a call.*\\[6, 9, 40\\]"):
        emulator.solve(problem, check=False)
    emulator.solve(problem, check=False)
    emulator.faults.raise_pending()


def test_the_earliest_fault_is_told(
    emulator: Emulator, make_problem: Callable[..., Problem]
) -> None:
    small, large = make_problem(3, 4, batch=8), make_problem(14, 14, batch=2)
    emulator.solve(spoilt(small, "cost NaN", 6), check=False)
    emulator.faults.alarm.zero_()  # as if the host had not seen it yet
    emulator.solve(spoilt(large, "unequal", 1), check=False)
    with pytest.raises(ValueError, match=r"cost: .*problem 6 of a call.*\[8, 3, 4\]"):
        emulator.faults.raise_pending()
    emulator.faults.raise_pending()


def test_a_check_does_not_blame_its_own_problems_for_an_earlier_fault(
    emulator: Emulator, make_problem: Callable[..., Problem]
) -> None:
    problem = make_problem(3, 4, batch=8)
    emulator.solve(spoilt(problem, "supply zero", 7), check=False)
    emulator.faults.alarm.zero_()
    with pytest.raises(ValueError, match=r"supply: .*in problem 7 of a call"):
        emulator.solve(make_problem(3, 4, batch=2), check=True)


def test_too_many_pivots_are_an_error(tmp_path: Path, make_problem: Callable[..., Problem]) -> None:
    variant = Variant("float", 28, 1)
    impatient = Emulator(tmp_path, [variant], PIVOT_LIMIT="3")
    problem = make_problem(25, 25, batch=2)
    with pytest.raises(RuntimeError, match=r"pivots.*problem 0 of a call.*\[2, 25, 25\]"):
        impatient.solve(problem, check=True)
    assert torch.isnan(impatient.solve(problem, check=False).value).all()


# The border.


def test_too_many_nodes(emulator: Emulator, make_problem: Callable[..., Problem]) -> None:
    with pytest.raises(ValueError, match=r"at most 64 nodes.*\[3, 65, 2\].*sinkhorn"):
        emulator.solve(make_problem(65, 2))


def test_empty_batch(emulator: Emulator) -> None:
    plan = emulator.solve((torch.empty(0, 3, 4), torch.empty(0, 3), torch.empty(0, 4)))
    assert plan.value.shape == (0,)
    assert plan.flow is not None
    assert plan.flow.shape == (0, 3, 4)


def test_cpu_tensors_are_refused(make_problem: Callable[..., Problem]) -> None:
    with pytest.raises(ValueError, match="cost: expected a CUDA tensor, got one on cpu"):
        solve_simplex_cuda(*make_problem(3, 4))


def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.cuda_core.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(
        ImportError, match=r'pip install "emd_retrieval\[gpu\]".*sinkhorn.*qp.*cpu_r'
    ):
        kernel.cuda_core()


def test_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"8\.0 or later, and Tesla T4 has 7\.5.*sinkhorn"):
        kernel.load_kernel(Variant("float", 28, 1), 0)


def test_pending_faults_of_no_device() -> None:
    with pytest.raises(ValueError, match="device: expected a CUDA device, got cpu"):
        raise_pending_faults("cpu")


@pytest.mark.parametrize(
    ("N", "M", "name"),
    [
        (1, 1, "network_simplex<float, 4, 1>"),
        (25, 32, "network_simplex<float, 28, 1>"),
        (64, 33, "network_simplex<float, 64, 2>"),
    ],
)
def test_variant_of_a_shape(N: int, M: int, name: str) -> None:
    assert Variant.for_shape(torch.float32, N, M).name == name


# The kernel compiled for GPUs that are not here.


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_compiles(architecture: str, tmp_path: Path) -> None:
    variants = [Variant("float", 16, 1), Variant("float", 28, 1), Variant("double", 64, 2)]
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            pytest.skip("neither cuda.bindings with NVRTC nor nvcc at hand to compile the kernel")
        source = tmp_path / "variants.cu"
        uses = [f"const void* p{i} = (const void*){v.name};" for i, v in enumerate(variants)]
        source.write_text("\n".join([f'#include "{SOURCE}"', *uses, ""]))
        command = [nvcc, "-std=c++17", f"-arch={architecture}", "-cubin", "-Werror", "all-warnings"]
        command += [f"-D{name}={value}" for name, value in MACROS.items()]
        command += ["-o", str(tmp_path / "cubin"), str(source)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        return

    if int(architecture.removeprefix("sm_")) not in nvrtc.nvrtcGetSupportedArchs()[-1]:
        pytest.skip(f"NVRTC {nvrtc.nvrtcVersion()[1:]} is older than {architecture}")

    def call(function: Callable[..., tuple[object, ...]], *arguments: object) -> object:
        status, *result = function(*arguments)
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{function.__name__}: {status}\n{log()}"
        return result[0] if result else None

    def log() -> str:
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        text = b" " * size
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.rstrip(b" \0\n").decode()

    program = nvrtc.nvrtcCreateProgram(kernel.source().encode(), b"network_simplex.cu", 0, [], [])[
        1
    ]
    for variant in variants:
        call(nvrtc.nvrtcAddNameExpression, program, variant.name.encode())
    options = ["--std=c++17", f"--gpu-architecture={architecture}"]
    options += [f"--define-macro={name}={value}" for name, value in MACROS.items()]
    call(nvrtc.nvrtcCompileProgram, program, len(options), [o.encode() for o in options])
    assert log() == ""
    cubin = b" " * int(str(call(nvrtc.nvrtcGetCUBINSize, program)))
    call(nvrtc.nvrtcGetCUBIN, program, cubin)
    for variant in variants:
        lowered = call(nvrtc.nvrtcGetLoweredName, program, variant.name.encode())
        assert isinstance(lowered, bytes)
        assert lowered in cubin


def test_compiles_through_cuda_core() -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    kernel.cuda_core.cache_clear()
    code = kernel.compile_kernel(Variant("float", 28, 1), "sm_90")
    assert len(code.code) > 1000


# The emulator itself.


@pytest.fixture(scope="module")
def rule_breakers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("rule_breakers")
    library = compile_for_host(EMULATOR / "rule_breakers.cpp", folder / "rule_breakers.so", {})
    library.report_on.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("keeps_the_rules", ""),
        ("diverges", "lanes diverge"),
        ("leaves_others_waiting", "waits for others that have returned"),
        ("names_half_the_lanes", "the lane mask is not full"),
        ("shuffles_from_no_lane", "shuffle from lane 32"),
        ("reads_beside_a_write", "race: "),
        ("writes_beside_a_read", "race: "),
        ("writes_twice", "race: "),
        ("reads_beside_an_atomic", "race: "),
        ("reads_what_nobody_wrote", "read before this warp wrote it"),
        ("overflows", "overflow in __viaddmin_s32"),
    ],
)
@pytest.mark.parametrize("lane_order", [0, 1, 2])
def test_emulator_reports(
    rule_breakers: ctypes.CDLL, name: str, report: str, lane_order: int
) -> None:
    said = rule_breakers.report_on(name.encode(), ctypes.c_uint64(lane_order)).decode()
    assert said == "" if report == "" else report in said


# With a GPU.


def to_gpu(problem: Problem) -> Problem:
    cost, supply, demand = problem
    return cost.cuda(), supply.cuda(), demand.cuda()


def to_cpu(plan: TransportPlan) -> TransportPlan:
    parts = (plan.value, plan.flow, plan.supply_potential, plan.demand_potential)
    return TransportPlan(*(None if part is None else part.cpu() for part in parts))  # type: ignore[arg-type]


class TestOnGpu:
    pytestmark = needs_gpu

    def test_every_kind(
        self,
        every_kind: list[tuple[str, Problem, Tensor]],
        certify: Callable[..., None],
        unit: Callable[..., Tensor],
    ) -> None:
        for name, problem, value in every_kind:
            plan = to_cpu(solve(*to_gpu(problem), check=True))
            assert ((plan.value.double() - value).abs() <= 1e-6 * unit(*problem)).all(), name
            certify(problem, plan)

    @pytest.mark.parametrize(("N", "M"), SIZES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_cpu(
        self,
        make_problem: Callable[..., Problem],
        certify: Callable[..., None],
        unit: Callable[..., Tensor],
        N: int,
        M: int,
        dtype: torch.dtype,
    ) -> None:
        for weights in ("relu", "equal", "zeros", "one_hot", "lognormal"):
            problem = make_problem(N, M, batch=200, weights=weights, dtype=dtype)
            plan = to_cpu(solve(*to_gpu(problem), check=True))
            value = solve(*problem).value
            assert ((plan.value - value).abs() <= 1e-6 * unit(*problem)).all()
            certify(problem, plan)

    def test_equals_emulator(
        self, emulator: Emulator, make_problem: Callable[..., Problem]
    ) -> None:
        problem = make_problem(25, 25, batch=50)
        plan = to_cpu(solve(*to_gpu(problem)))
        # One basis, so equal flows; sums in double may be fused on one side.
        expected = emulator.solve(problem)
        assert torch.equal(plan.flow, expected.flow)  # type: ignore[arg-type]
        torch.testing.assert_close(plan.value, expected.value, rtol=1e-6, atol=0)

    def test_gradients(self, make_problem: Callable[..., Problem]) -> None:
        # Lognormal weights have no equal sums: the potentials are unique and may be compared.
        problem = make_problem(14, 25, batch=20, weights="lognormal", dtype=torch.float64)
        gradients = []
        for place in (problem, to_gpu(problem)):
            leaves = [part.clone().requires_grad_() for part in place]
            value = emd(*leaves)
            (value * torch.arange(20, device=value.device)).sum().backward()
            gradients.append([leaf.grad.cpu() for leaf in leaves])  # type: ignore[union-attr]
        for on_cpu, on_gpu in zip(*gradients, strict=True):
            torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-6)

    def test_streams(self, make_problem: Callable[..., Problem]) -> None:
        problem = to_gpu(make_problem(25, 25, batch=2000))
        expected = solve(*problem).value
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(4)]
        values = []
        for stream in streams * 3:
            with torch.cuda.stream(stream):
                late = problem[0] + 1  # on this stream: a launch on another would not see it
                values.append(solve(late, *problem[1:]).value)
        torch.cuda.synchronize()
        for value in values:
            torch.testing.assert_close(value, expected + 1, rtol=0, atol=1e-5)

    def test_does_not_wait(self, make_problem: Callable[..., Problem]) -> None:
        problem = to_gpu(make_problem(14, 14))
        solve(*problem)
        torch.cuda.set_sync_debug_mode("error")
        try:
            solve(*problem)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_threads(self, make_problem: Callable[..., Problem]) -> None:
        problem = to_gpu(make_problem(14, 14, batch=100))
        expected = solve(*problem).value
        results: list[Tensor] = []
        threads = [
            threading.Thread(target=lambda: results.append(solve(*problem).value)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8
        assert all(torch.equal(result, expected) for result in results)

    @pytest.mark.parametrize(("kind", "words"), FAULTS)
    def test_faults(self, make_problem: Callable[..., Problem], kind: str, words: str) -> None:
        problem = make_problem(14, 9, batch=9)
        bad = to_gpu(spoilt(problem, kind, 7, 4))
        with pytest.raises(ValueError, match=f"{words}.*problem \\[4\\]"):
            solve(*bad, check=True)
        plan = solve(*bad)
        with pytest.raises(ValueError, match=f"{words}.*problem 4 of a call.*\\[9, 14, 9\\]"):
            raise_pending_faults()
        assert torch.isnan(plan.value).nonzero().flatten().tolist() == [4, 7]
        solve(*bad)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=words):
            solve(*to_gpu(problem))
        raise_pending_faults()

    def test_large_batch(self, make_problem: Callable[..., Problem]) -> None:
        problem = to_gpu(make_problem(25, 25, batch=64))
        many = tuple(part.repeat(2000, *[1] * (part.dim() - 1)) for part in problem)
        value = solve(*many, need_flow=False, need_potentials=False, check=True).value
        assert torch.equal(value.view(2000, 64), solve(*problem).value.expand(2000, 64))
