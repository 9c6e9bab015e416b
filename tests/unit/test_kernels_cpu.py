"""The CPU backend: its tiles, its C++ in every variant, and how that is compiled."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.kernel_suite import WIDTHS, KernelSuite
from vllm_atomic_moe.experts.backends import cpu
from vllm_atomic_moe.experts.backends.cpu import library as cpu_library
from vllm_atomic_moe.experts.backends.cpu.library import Library, VariantError


class TestCPU(KernelSuite):
    """The compiled library of this machine."""

    backend = "cpu"


REASON = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
needs_library = pytest.mark.skipif(REASON is not None, reason=REASON or "")
DTYPES = (torch.bfloat16, torch.float32)
FULL = 160
VARIANTS = {variant.name: variant for variant in cpu_library.VARIANTS}


@dataclass
class Problem:
    """Packed experts and the matrices [E, F, H] that they came from."""

    weights: list[torch.Tensor]
    offsets_E1: torch.Tensor
    matrices: dict[str, list[torch.Tensor]]

    def whole(self) -> torch.Tensor:
        """Runs of all rows of every expert."""
        return torch.stack([self.offsets_E1[:-1], self.offsets_E1.diff()], 1).int()[:, None]

    def expected(self, x_TH, runs_ER2, topk_weights_TK, ids_TK):
        """The result in float64, h rounded to x's dtype."""
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
        for expert, runs in enumerate(runs_ER2.tolist()):
            gate, up, down = (self.matrices[name][expert].double() for name in self.matrices)
            x = x_TH.double()
            h_TF = functional.silu(x @ gate.t()) * (x @ up.t())
            used_F = torch.zeros(h_TF.shape[1], dtype=torch.float64)
            for first, length in runs:
                start = first - int(self.offsets_E1[expert])
                used_F[start : start + length] = 1
            h_TF = torch.where(used_F > 0, h_TF, 0).to(x_TH.dtype).double()
            weights_T1 = (topk_weights_TK.double() * (ids_TK == expert)).sum(1, keepdim=True)
            out_TH += weights_T1 * (h_TF @ down)
        return out_TH


def make_problem(widths=WIDTHS, hidden_size=152, dtype=torch.bfloat16) -> Problem:
    """Experts of those widths, sliced out of full matrices into poisoned tensors."""
    generator = torch.Generator().manual_seed(0)
    offsets_E1 = torch.tensor([0, *widths]).cumsum(0)
    weights = list(cpu.STORAGE.allocate(offsets_E1, hidden_size, dtype, None).values())
    weights[0].fill_(torch.nan)
    matrices: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
    for expert, width in enumerate(widths):
        atoms_F = torch.randperm(max(FULL, width), generator=generator)[:width]
        for name, rows in matrices.items():
            shape = (max(FULL, width), hidden_size)
            if name == "down":
                rows_IH = torch.randn(shape[::-1], generator=generator).to(dtype).t()
            else:
                rows_IH = torch.randn(shape, generator=generator).to(dtype)
            rows_IH = rows_IH / hidden_size**0.5
            cpu.STORAGE.write(weights, offsets_E1, expert, name, rows_IH, atoms_F)
            rows.append(rows_IH[atoms_F])
    return Problem(weights, offsets_E1, matrices)


def make_input(tokens, experts, hidden_size=152, dtype=torch.bfloat16, k=3):
    """Activations, router weights and ids, of which some belong to nobody here."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    ids_TK = torch.rand(tokens, experts + 2, generator=generator).topk(k, dim=1).indices - 1
    return x_TH, torch.rand(tokens, k, generator=generator), ids_TK


def run(problem, x_TH, topk_weights_TK, ids_TK, runs_ER2=None, threads=2, library=None):
    runs_ER2 = problem.whole() if runs_ER2 is None else runs_ER2
    library = library or cpu._library()
    return library.fused_experts(x_TH, *problem.weights, runs_ER2, topk_weights_TK, ids_TK, threads)


def assert_close(found, expected):
    tolerance = 1e-2 if found.dtype == torch.bfloat16 else 2e-6
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def unpack(problem: Problem, expert: int, hidden_size: int) -> dict[str, torch.Tensor]:
    """The layout in words of indices: rows of an expert, padding included, [F, H]."""
    packed = problem.weights[0]
    per_unit = 2 if packed.dtype == torch.bfloat16 else 1
    widths = [(width + 1) // 2 * 2 for width in problem.offsets_E1.diff().tolist()]
    at, atoms = 3 * hidden_size * sum(widths[:expert]), widths[expert]
    gate, up, down = [], [], []
    for tile in range(0, atoms, 32):
        half = min(32, atoms - tile)
        panel = packed[at : at + 2 * half * hidden_size]
        panel = panel.view(hidden_size // per_unit, 2 * half, per_unit).transpose(0, 1)
        panel = panel.reshape(2 * half, hidden_size)
        gate.append(panel[:half])
        up.append(panel[half:])
        at += panel.numel()
    for column in range(0, hidden_size, 64):
        columns = min(64, hidden_size - column)
        panel = packed[at : at + columns * atoms].view(atoms // per_unit, columns, per_unit)
        down.append(panel.transpose(1, 2).reshape(atoms, columns))
        at += panel.numel()
    empty = packed.new_empty(0, hidden_size)
    return {
        "gate": torch.cat([*gate, empty]),
        "up": torch.cat([*up, empty]),
        "down": torch.cat(down, 1),
    }


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [2, 62, 64, 152])
def test_layout_holds_every_row_and_nothing_but_zeros(dtype, hidden_size):
    problem = make_problem(hidden_size=hidden_size, dtype=dtype)
    for expert, width in enumerate(WIDTHS):
        for name, rows in unpack(problem, expert, hidden_size).items():
            assert torch.equal(rows[:width], problem.matrices[name][expert])
            assert not rows[width:].count_nonzero()
    assert torch.equal(problem.weights[1], problem.offsets_E1)


def test_padding_is_at_most_one_atom_per_expert():
    offsets_E1 = torch.tensor([0, *WIDTHS]).cumsum(0)
    weights = cpu.STORAGE.allocate(offsets_E1, 64, torch.bfloat16, torch.device("meta"))
    odd = sum(width % 2 for width in WIDTHS)
    assert list(weights) == ["packed", "offsets"]
    assert weights["packed"].numel() == 3 * 64 * (sum(WIDTHS) + odd)
    assert {weight.device.type for weight in weights.values()} == {"meta"}


def test_an_odd_hidden_size_is_refused():
    with pytest.raises(ValueError, match="hidden size 33 is odd"):
        cpu.STORAGE.allocate(torch.tensor([0, 2]), 33, torch.bfloat16, None)


@needs_library
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float16])
def test_rows_of_any_strides_and_dtype_are_written(projection, source):
    offsets_E1, atoms_F = torch.tensor([0, 5, 42]), torch.randperm(50)[:37]
    rows = torch.randn(100, 140).to(source)
    packed = []
    for view in (rows[::2, ::2], rows[::2, ::2].contiguous(), rows[::2, ::2].t().contiguous().t()):
        weights = list(cpu.STORAGE.allocate(offsets_E1, 70, torch.bfloat16, None).values())
        weights[0].zero_()
        cpu.STORAGE.write(weights, offsets_E1, 1, projection, view, atoms_F)
        packed.append(weights[0])
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], packed[2])
    assert packed[0].count_nonzero() == 37 * 70


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 200])
@pytest.mark.parametrize("hidden_size", [24, 152, 256])
def test_ragged_widths(dtype, tokens, hidden_size):
    problem = make_problem(hidden_size=hidden_size, dtype=dtype)
    arguments = make_input(tokens, len(WIDTHS), hidden_size, dtype)
    x_TH, topk_weights_TK, ids_TK = arguments
    expected = problem.expected(x_TH, problem.whole(), topk_weights_TK, ids_TK)
    assert_close(run(problem, *arguments), expected)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_begin_and_end_inside_tiles(dtype):
    problem = make_problem((129, 160, 0, 33, 2), dtype=dtype)
    runs_ER2 = torch.tensor(
        [
            [[1, 2], [3, 5], [40, 60], [128, 1]],  # two in one tile, whole tiles between, the last
            [[129, 31], [161, 1], [192, 33], [280, 9]],  # an odd atom is left out, one is alone
            [[289, 0], [0, 0], [0, 0], [0, 0]],
            [[321, 1], [0, 0], [289, 1], [0, 0]],  # in descending order, empty ones between
            [[323, 1], [0, 0], [0, 0], [0, 0]],
        ]
    ).int()
    for tokens in (1, 50):
        x_TH, topk_weights_TK, ids_TK = make_input(tokens, 5, dtype=dtype)
        expected = problem.expected(x_TH, runs_ER2, topk_weights_TK, ids_TK)
        assert_close(run(problem, x_TH, topk_weights_TK, ids_TK, runs_ER2), expected)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_experts_are_summed_in_segments(dtype):
    problem = make_problem((5000,), hidden_size=64, dtype=dtype)
    runs_ER2 = torch.tensor([[[3, 4990]]]).int()
    x_TH, topk_weights_TK, ids_TK = make_input(9, 1, 64, dtype, k=2)
    expected = problem.expected(x_TH, runs_ER2, topk_weights_TK, ids_TK)
    assert_close(run(problem, x_TH, topk_weights_TK, ids_TK, runs_ER2), expected)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 700])
def test_any_number_of_threads_gives_the_same_bits(dtype, tokens):
    problem = make_problem(dtype=dtype)
    arguments = make_input(tokens, len(WIDTHS), dtype=dtype)
    alone = run(problem, *arguments, threads=1)
    for threads in (2, 3, 7, 64):
        assert torch.equal(run(problem, *arguments, threads=threads), alone)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch(dtype):
    problem = make_problem(dtype=dtype)
    x_TH, topk_weights_TK, ids_TK = make_input(40, len(WIDTHS), dtype=dtype)
    together = run(problem, x_TH, topk_weights_TK, ids_TK)
    each = [
        run(problem, x_TH[t : t + 1], topk_weights_TK[t : t + 1], ids_TK[t : t + 1])
        for t in range(40)
    ]
    if "amx_bf16" in cpu_library.cpu_flags() and dtype == torch.bfloat16:
        assert_close(torch.cat(each), together.double())  # few rows do not use AMX
    else:
        assert torch.equal(torch.cat(each), together)


@needs_library
def test_nothing_is_left_over_from_another_call():
    """Scratch of a call full of NaN, and an output that begins as NaN."""
    problem = make_problem()
    arguments = make_input(40, len(WIDTHS))
    runs_ER2 = problem.whole()
    runs_ER2[:, :, 0] += runs_ER2[:, :, 1] // 3
    runs_ER2[:, :, 1] //= 3
    wanted = run(problem, *arguments, runs_ER2)
    everywhere = torch.full_like(arguments[0], torch.nan)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for threads in (2, 1):
            run(problem, everywhere, *arguments[1:], threads=threads)
            found = run(problem, *arguments, runs_ER2, threads=threads)
            assert torch.equal(found, wanted)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_library
def test_bad_activations_stay_in_their_token():
    problem = make_problem()
    x_TH, topk_weights_TK, ids_TK = make_input(20, len(WIDTHS))
    clean = run(problem, x_TH, topk_weights_TK, ids_TK)
    ids_TK[3] = 8
    x_TH[3] = torch.nan
    found = run(problem, x_TH, topk_weights_TK, ids_TK)
    assert found[3].isnan().all()
    others = torch.arange(20) != 3
    assert torch.equal(found[others], clean[others])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates_saturate(dtype):
    problem = make_problem((4,), hidden_size=64, dtype=dtype)
    x_TH, topk_weights_TK, ids_TK = make_input(6, 1, 64, dtype, k=2)
    expected = problem.expected(x_TH * 1000, problem.whole(), topk_weights_TK, ids_TK)
    assert_close(run(problem, x_TH * 1000, topk_weights_TK, ids_TK), expected)


@needs_library
def test_gates_of_any_size_are_as_in_torch():
    """Each the gate of an expert of its own, whose other factors are 1."""
    sizes = [0, 1e-30, 1, 50, 87, 90, 100, 1e4, 1e15, 1e30, torch.inf, torch.nan]
    gates_E = torch.tensor([sign * size for size in sizes for sign in (1, -1)])
    offsets_E1 = torch.arange(len(gates_E) + 1)
    weights = list(cpu.STORAGE.allocate(offsets_E1, 2, torch.float32, None).values())
    for expert, gate in enumerate(gates_E):
        for name, row in {"gate": [gate, 0], "up": [1, 0], "down": [1, 0]}.items():
            rows_SH = torch.tensor([row], dtype=torch.float32)
            cpu.STORAGE.write(weights, offsets_E1, expert, name, rows_SH, torch.tensor([0]))
    ids_TK = torch.arange(len(gates_E))[:, None]
    x_TH, topk_weights_TK = torch.ones(len(gates_E), 2), torch.ones(len(gates_E), 1)
    runs_ER2 = torch.stack([offsets_E1[:-1], offsets_E1.diff()], 1).int()[:, None]
    arguments = (*weights, runs_ER2, topk_weights_TK, ids_TK)
    found_T = cpu._library().fused_experts(x_TH, *arguments, 1)[:, 0]
    wanted_T = functional.silu(gates_E)
    assert torch.allclose(found_T, wanted_T, rtol=2e-6, atol=1e-35, equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["native", "emulated"])
def test_many_tokens_are_computed_in_chunks(dtype, variant, request):
    """Scratch is bounded: with 16 experts a token as wide as this one, about 100 tokens of it."""
    library = None if variant == "native" else request.getfixturevalue("emulated")
    problem = make_problem((20000, 7), hidden_size=2, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    x_TH = torch.randn(250, 2, generator=generator).to(dtype)
    topk_weights_TK = torch.rand(250, 16, generator=generator)
    ids_TK = (torch.rand(250, 16, generator=generator) < 0.9).long()
    expected = problem.expected(x_TH, problem.whole(), topk_weights_TK, ids_TK)
    assert_close(run(problem, x_TH, topk_weights_TK, ids_TK, library=library), expected)


@needs_library
def test_runs_beyond_their_expert_are_cut_off():
    """They would write beyond scratch, and read other experts' weights."""
    problem = make_problem((40, 33, 64))
    arguments = make_input(7, 3)
    beyond_ER2 = torch.tensor([[[-50, 10**9]], [[0, 73]], [[73, 1 << 30]]]).int()
    assert torch.equal(run(problem, *arguments, beyond_ER2), run(problem, *arguments))
    outside_ER2 = torch.tensor([[[40, 97]], [[-(1 << 31), 7]], [[137, 5]]]).int()
    assert not run(problem, *arguments, outside_ER2).count_nonzero()


@needs_library
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_TH": torch.ones(3, 152)}, "x is torch.float32, the weights are torch.bfloat16"),
        ({"x_TH": torch.ones(3, 150).bfloat16()}, "1824 numbers for hidden size 150"),
        ({"x_TH": torch.ones(3, 152, device="meta").bfloat16()}, "on meta, wanted cpu"),
        ({"packed": torch.ones(912, 4).bfloat16().t()}, "wanted contiguous"),
        ({"offsets_E1": torch.tensor([0, 2, 4]).int()}, "offsets are torch.int32"),
        (
            {"offsets_E1": torch.tensor([0, 4])},
            r"'offsets': torch.Size\(\[2\]\).*wanted.*\(3,\)",
        ),
        ({"runs_ER2": torch.zeros(2, 1, 2).long()}, "runs are torch.int64, wanted int32"),
        ({"runs_ER2": torch.zeros(2, 2, 2).int()[:, ::2]}, "wanted contiguous"),
        ({"topk_weights_TK": torch.ones(3, 3)}, r"router weights are .*\[3, 3\].*, ids .*\[3, 2\]"),
        ({"x_TH": torch.ones(4, 152).bfloat16()}, "3 rows of expert ids for 4 tokens"),
        ({"topk_ids_TK": torch.ones(3, 2)}, "expert ids are torch.float32"),
    ],
)
def test_arguments_that_only_our_own_bug_could_pass(change, said):
    offsets_E1 = torch.tensor([0, 2, 4])
    right = {
        "x_TH": torch.ones(3, 152).bfloat16(),
        "packed": torch.ones(3 * 152 * 4).bfloat16(),
        "offsets_E1": offsets_E1,
        "runs_ER2": torch.tensor([[[0, 2]], [[2, 2]]]).int(),
        "topk_weights_TK": torch.ones(3, 2),
        "topk_ids_TK": torch.tensor([[0, 1]] * 3),
    }
    assert cpu._library().fused_experts(**right, threads=1).shape == (3, 152)
    with pytest.raises(AssertionError, match=said):
        cpu._library().fused_experts(**{**right, **change}, threads=1)


@needs_library
@pytest.mark.parametrize(
    ("rows_SH", "atoms_F", "said"),
    [
        (torch.ones(4, 8), torch.arange(2), "torch.float32 into torch.bfloat16"),
        (torch.ones(4, 8).bfloat16(), torch.arange(2).int(), "atoms are torch.int32"),
        (torch.ones(4, 8).bfloat16(), torch.arange(3), "lie beyond"),
    ],
)
def test_rows_that_only_our_own_bug_could_pack(rows_SH, atoms_F, said):
    with pytest.raises(AssertionError, match=said):
        cpu._library().pack(torch.ones(3 * 8 * 2).bfloat16(), 0, "gate", rows_SH, atoms_F, 1)


@needs_library
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer ends it")
def test_no_memory_is_an_exception():
    """Offsets of an expert so wide that no address space could hold its activations."""
    problem = make_problem((8, 4))
    problem.offsets_E1[:] = torch.tensor([0, 8, 1 << 52])
    problem.weights[1] = problem.offsets_E1
    x_TH, topk_weights_TK, _ = make_input(3, 2)
    ids_TK, runs_ER2 = torch.ones(3, 3), torch.zeros(2, 1, 2).int()
    with pytest.raises(MemoryError, match="no memory for the experts of 3 tokens"):
        run(problem, x_TH, topk_weights_TK, ids_TK.long(), runs_ER2)
    problem = make_problem((8, 4))
    arguments = make_input(3, 2)
    expected = problem.expected(arguments[0], problem.whole(), *arguments[1:])
    assert_close(run(problem, *arguments), expected)


@needs_library
def test_ids_beyond_any_width_are_skipped():
    problem = make_problem()
    ids_TK = torch.tensor([[-1, 1 << 40], [len(WIDTHS), -(1 << 33)]])
    found = run(problem, torch.ones(2, 152).bfloat16(), torch.ones(2, 2), ids_TK)
    assert not found.count_nonzero()


# ---- the variants of the source, and how they are compiled ---------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """No library is loaded yet."""
    if not cpu_library.VARIANTS[-1].cpu_flags <= cpu_library.cpu_flags():
        pytest.skip("the processor has no AVX-512")
    cpu._load.cache_clear()
    yield monkeypatch
    cpu._load.cache_clear()


@pytest.fixture
def fresh(unloaded, tmp_path):
    """Nothing is compiled yet either."""
    unloaded.setenv("ATOMIC_MOE_CACHE", str(tmp_path / "cache"))
    return unloaded


def test_avx512_without_bfloat16_compiles_and_computes(fresh):
    library = Library(cpu_library.build(VARIANTS["avx512"]))
    cpu._check(library)
    problem = make_problem()
    arguments = make_input(33, len(WIDTHS))
    expected = problem.expected(arguments[0], problem.whole(), *arguments[1:])
    assert_close(run(problem, *arguments, library=library), expected)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The AMX variant over emulated instructions."""
    if not VARIANTS["avx512_bf16"].cpu_flags <= cpu_library.cpu_flags():
        pytest.skip("the processor has no AVX-512 for bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        header = Path(__file__).with_name("amx_emulation.h")
        compiler = os.environ.get("CXX") or "g++"
        patch.setenv("CXX", f"{compiler} -include {header}")
        patch.setenv("ATOMIC_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        library = Library(cpu_library.build(VARIANTS["amx"]))
    library.functions.amx_products.restype = ctypes.c_int64
    return library


@needs_library
@pytest.mark.parametrize("hidden_size", [24, 152, 256])
@pytest.mark.parametrize("tokens", [1, 7, 50, 200])
def test_amx_in_emulation(emulated, hidden_size, tokens):
    problem = make_problem(hidden_size=hidden_size)
    arguments = make_input(tokens, len(WIDTHS), hidden_size)
    runs_ER2 = problem.whole()
    runs_ER2[:, :, 0] += runs_ER2[:, :, 1] // 3
    runs_ER2[:, :, 1] -= runs_ER2[:, :, 1] // 3
    expected = problem.expected(arguments[0], runs_ER2, *arguments[1:])
    before = emulated.functions.amx_products()
    found = run(problem, *arguments, runs_ER2, library=emulated)
    assert_close(found, expected)
    assert (emulated.functions.amx_products() > before) == (tokens >= 50)
    for threads in (1, 3):
        assert torch.equal(
            run(problem, *arguments, runs_ER2, threads=threads, library=emulated), found
        )


@needs_library
def test_amx_in_emulation_passes_the_self_check_and_does_float32(emulated):
    before = emulated.functions.amx_products()
    cpu._check(emulated)
    assert emulated.functions.amx_products() > before
    problem = make_problem(dtype=torch.float32)
    arguments = make_input(50, len(WIDTHS), dtype=torch.float32)
    assert torch.equal(run(problem, *arguments, library=emulated), run(problem, *arguments))


@needs_library
def test_the_self_check_does_not_follow_torch_defaults(unloaded):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert cpu.unavailable(torch.device("cpu"), torch.float32) == REASON
    finally:
        torch.set_default_dtype(torch.float32)


def test_other_devices_dtypes_and_processors_are_declined(monkeypatch):
    cpu_device = torch.device("cpu")
    assert cpu.unavailable(torch.device("cuda"), torch.bfloat16) == "the device is cuda"
    assert "not in float16" in cpu.unavailable(cpu_device, torch.float16)
    monkeypatch.setattr(cpu_library, "cpu_flags", frozenset)
    cpu._load.cache_clear()
    assert cpu.unavailable(cpu_device, torch.bfloat16) == "the processor has no AVX-512"
    cpu._load.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C++ compiler: no-such-compiler not found; install g++ or set CXX"),
        ("false", "the C++ compiler false failed"),
        ("g++ -DPlan=7", "error: expected"),
    ],
)
def test_a_compiler_that_is_missing_or_broken(fresh, compiler, reason):
    fresh.setenv("CXX", compiler)
    assert reason in cpu.unavailable(torch.device("cpu"), torch.bfloat16)


def test_a_cache_that_cannot_be_written(fresh, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert "set ATOMIC_MOE_CACHE" in cpu.unavailable(torch.device("cpu"), torch.bfloat16)


def test_a_user_without_a_home(fresh):
    for name in ("ATOMIC_MOE_CACHE", "XDG_CACHE_HOME", "HOME"):
        fresh.delenv(name, raising=False)
    fresh.setattr("pwd.getpwuid", dict[int, None]().__getitem__)  # KeyError
    reason = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
    assert reason == "this user has no home directory to compile into; set ATOMIC_MOE_CACHE"


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_cache_that_others_may_write_is_refused(fresh, tmp_path, mode):
    """What lies there would run here."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    reason = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
    assert f"may be written by others (mode {mode:o}); `chmod go-w` it or set" in reason
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_belongs_to_its_user_or_root(fresh, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o755)
    found, me = (tmp_path / "cache").stat(), os.geteuid()

    def owned_by(uid):
        owned = os.stat_result((*found[:4], uid, *found[5:]))
        fresh.setattr(Path, "stat", lambda self, **how: owned)

    for uid in (0, me):
        owned_by(uid)
        cpu_library._check_owner(tmp_path / "cache")
    owned_by(me + 1)
    with pytest.raises(VariantError, match=rf"belongs to another user \(uid {me + 1}\)"):
        cpu_library._check_owner(tmp_path / "cache")


@needs_library
def test_a_prebuilt_cache_may_be_read_only(fresh):
    """Not even a lock is opened where the library is there."""
    library = cpu_library.build(VARIANTS["avx512"])
    library.with_suffix(".lock").unlink()
    library.parent.chmod(0o555)
    fresh.setenv("PATH", "")
    assert cpu_library.build(VARIANTS["avx512"]) == library
    assert list(library.parent.iterdir()) == [library]


def test_the_lock_is_no_link_into_other_files(fresh, tmp_path):
    library = cpu_library.build(VARIANTS["avx512"])
    assert library.parent.stat().st_mode & 0o022 == library.stat().st_mode & 0o022 == 0
    other, lock = tmp_path / "other", library.with_suffix(".lock")
    other.write_text("kept")
    library.unlink()
    lock.unlink()
    lock.symlink_to(other)
    with pytest.raises(VariantError, match=r"cannot use .*symbolic links.*; set ATOMIC_MOE_CACHE"):
        cpu_library.build(VARIANTS["avx512"])
    assert other.read_text() == "kept"


def test_a_library_that_cannot_be_loaded_is_compiled_anew(fresh):
    fresh.setattr(cpu_library, "COMMON_FLAGS", (*cpu_library.COMMON_FLAGS, "-O0"))
    library = cpu_library.build(VARIANTS["avx512"])
    library.write_text("from another system")
    with fresh.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(VariantError, match=r"no C\+\+ compiler"):
            cpu_library.load(VARIANTS["avx512"])
    assert cpu_library.load(VARIANTS["avx512"]).functions


@pytest.mark.parametrize(
    "name", ["platform.libc_ver", "vllm_atomic_moe.experts.backends.cpu.library._openmp"]
)
def test_another_system_has_libraries_of_its_own(fresh, name, tmp_path):
    fresh.setattr(cpu_library, "_compile", lambda command: Path(command[-3]).touch())
    fresh.setattr(cpu_library, "_openmp", lambda: ["/a/libgomp.so.1", "-Wl,--as-needed"])
    before = cpu_library.build(VARIANTS["avx512"])
    assert cpu_library.build(VARIANTS["avx512"]) == before
    fresh.setattr(name, lambda: ["/a/libgomp-1234.so.1", "-Wl,--as-needed"])
    assert cpu_library.build(VARIANTS["avx512"]) != before


def test_building_ahead_skips_what_the_compiler_does_not_know(fresh, tmp_path, capsys):
    """Only avx512 is compiled here, and only in name."""
    compiler = tmp_path / "old-compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *bf16*) echo "error: unknown option" >&2; exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
    )
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    assert cpu.main() == 0
    said = capsys.readouterr()
    assert [Path(line).name.split("-")[1] for line in said.out.splitlines()] == ["avx512"]
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["amx", "avx512_bf16"]
    fresh.setenv("CXX", "no-such-compiler")
    assert cpu.main() == 1


@needs_library
def test_a_library_that_computes_wrongly_is_not_used(unloaded, caplog):
    right = Library.fused_experts
    unloaded.setattr(Library, "fused_experts", lambda *arguments: right(*arguments) * 2)
    with caplog.at_level(logging.WARNING):
        reason = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
    assert reason.startswith("its self-check failed: relative error 1.0e+00")
    assert "its self-check failed" in caplog.text
    unloaded.setattr(Library, "fused_experts", lambda *arguments: right(*arguments) * torch.nan)
    cpu._load.cache_clear()
    assert "relative error nan" in cpu.unavailable(torch.device("cpu"), torch.bfloat16)


def test_two_processes_compile_once_and_a_prebuilt_library_needs_no_compiler(fresh, tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho called >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    code = (
        "from vllm_atomic_moe.experts.backends.cpu import library; "
        "print(library.build(library.VARIANTS[-1]))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in both}
    assert len(paths) == 1
    assert log.read_text().splitlines() == ["called"]
    compiler.unlink()
    assert str(cpu_library.build(cpu_library.VARIANTS[-1])) in paths


@needs_library
def test_the_process_has_one_openmp_runtime():
    code = (
        "import torch; from vllm_atomic_moe.experts.backends import cpu; "
        "from vllm_atomic_moe.experts.backends.cpu import library; "
        "before = library._openmp_runtimes(); cpu._library(); "
        "assert before == library._openmp_runtimes() and len(before) == 1, before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
