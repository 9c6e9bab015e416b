"""The CPU backend: its tiles, its C++ in every variant, and its compilation."""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.kernel_suite import WIDTHS, KernelSuite
from vllm_atomic_moe.experts.backends import choose_backend, cpu, reference
from vllm_atomic_moe.experts.backends.cpu import library as cpu_library
from vllm_atomic_moe.experts.backends.cpu.library import Library, VariantError
from vllm_atomic_moe.experts.formats import Encoded
from vllm_atomic_moe.experts.packing import PackedExperts, build_layout, with_slots
from vllm_atomic_moe.files.row_formats import PLAIN, PROJECTIONS, Block, RowFormat

REASON = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
needs_library = pytest.mark.skipif(REASON is not None, reason=REASON or "")
DTYPES = cpu_library.DTYPES
FULL = 160
VARIANTS = {variant.name: variant for variant in cpu_library.VARIANTS}
# AMX has rules of its own for who is computed with whom.
USABLE = [variant.name for variant in cpu_library.usable_variants()]
LOWEST = USABLE[-1] if USABLE else None
FP8 = RowFormat("e4m3", Block(16, 32), Block(32, 16))
INT4 = RowFormat("int4", Block(1, 32), Block(32, 1), torch.bfloat16)
AWQ = RowFormat("uint4", Block(1, 32), Block(32, 1), torch.float16, zeros=True)
NVFP4 = RowFormat("e2m1", Block(1, 16), Block(16, 1), torch.float8_e4m3fn, factor="over")
CODED = (FP8, INT4, AWQ, NVFP4)


@contextmanager
def forced(isa: str) -> Iterator[None]:
    """Within the context, `isa` is the widest instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOMIC_MOE_CPU_ISA", isa)
        cpu._load.cache_clear()
        try:
            yield
        finally:
            cpu._load.cache_clear()


class TestCPU(KernelSuite):
    """The compiled library in every instruction set of this machine."""

    backend = "cpu"
    dtypes = DTYPES

    @pytest.fixture(autouse=True, scope="class", params=USABLE)
    def _isa(self, request: pytest.FixtureRequest) -> Iterator[None]:
        with forced(request.param):
            assert cpu._library().functions._name.count(f"-{request.param}-")
            yield


@dataclass
class Problem:
    """Packed experts and the matrices [E, F, H] that they came from."""

    packed: torch.Tensor
    offsets_E1: torch.Tensor
    matrices: dict[str, list[torch.Tensor]]

    @property
    def words(self) -> torch.Tensor:
        """First word of every expert."""
        return torch.tensor([0, *((self.offsets_E1.diff() + 31) // 32).tolist()]).cumsum(0)

    def whole(self) -> list[list[tuple[int, int]]]:
        """Runs of all rows of every expert: (first row within it, number of rows)."""
        return [[(0, width)] for width in self.offsets_E1.diff().tolist()]

    def bits(self, runs) -> torch.Tensor:
        """Bits of slot 0 for the rows of `runs`."""
        words = [[0] * -(-width // 32) for width in self.offsets_E1.diff().tolist()]
        for expert, expert_runs in enumerate(runs):
            for first, length in expert_runs:
                for row in range(first, first + length):
                    words[expert][row // 32] |= 1 << row % 32
        words_W = torch.tensor([word for expert in words for word in expert], dtype=torch.int64)
        bits_SW = torch.zeros(16, len(words_W), dtype=torch.int32)
        bits_SW[0] = words_W.to(torch.int32)
        return bits_SW

    def expected(self, x_TH, topk_weights_TK, ids_TK, runs=None):
        """The result in float64, h rounded to x's dtype."""
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
        for expert, expert_runs in enumerate(runs or self.whole()):
            gate, up, down = (self.matrices[name][expert].double() for name in self.matrices)
            x = x_TH.double()
            h_TF = functional.silu(x @ gate.t()) * (x @ up.t())
            used_F = torch.zeros(h_TF.shape[1], dtype=torch.float64)
            for first, length in expert_runs:
                used_F[first : first + length] = 1
            h_TF = torch.where(used_F > 0, h_TF, 0).to(x_TH.dtype).double()
            weights_T1 = (topk_weights_TK.double() * (ids_TK == expert)).sum(1, keepdim=True)
            out_TH += weights_T1 * (h_TF @ down)
        return out_TH


def make_problem(widths=WIDTHS, hidden_size=152, dtype=torch.bfloat16) -> Problem:
    """Experts of those widths, sliced out of full matrices into poisoned tensors."""
    generator = torch.Generator().manual_seed(0)
    offsets_E1 = torch.tensor([0, *widths]).cumsum(0)
    (packed,) = cpu.STORAGE.allocate(offsets_E1, hidden_size, dtype, None).values()
    packed[: -64 // packed.element_size()] = torch.nan
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
            cpu.STORAGE.write([packed], offsets_E1, expert, name, rows_IH, atoms_F)
            rows.append(rows_IH[atoms_F])
    return Problem(packed, offsets_E1, matrices)


def make_input(tokens, experts, hidden_size=152, dtype=torch.bfloat16, k=3):
    """Activations, router weights and ids, some of which belong to no expert here."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    ids_TK = torch.rand(tokens, experts + 2, generator=generator).topk(k, dim=1).indices - 1
    return x_TH, torch.rand(tokens, k, generator=generator), ids_TK


def run(problem, x_TH, topk_weights_TK, ids_TK, runs=None, threads=2, library=None):
    return (library or cpu._library()).fused_experts(
        x_TH,
        problem.packed,
        problem.bits(runs or problem.whole()),
        problem.words,
        problem.offsets_E1,
        topk_weights_TK,
        with_slots(ids_TK, torch.zeros(1, dtype=torch.int32)),
        threads,
    )


def assert_close(found, expected):
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 2e-6}[found.dtype]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def unpack(problem: Problem, expert: int, hidden_size: int) -> dict[str, torch.Tensor]:
    """The layout, written with indices: rows of an expert, padding included, [F, H]."""
    packed = problem.packed
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
def test_layout_holds_every_row_and_zeros_elsewhere(dtype, hidden_size):
    problem = make_problem(hidden_size=hidden_size, dtype=dtype)
    for expert, width in enumerate(WIDTHS):
        for name, rows in unpack(problem, expert, hidden_size).items():
            assert torch.equal(rows[:width], problem.matrices[name][expert])
            assert not rows[width:].count_nonzero()


def test_padding_is_at_most_one_atom_per_expert():
    offsets_E1 = torch.tensor([0, *WIDTHS]).cumsum(0)
    weights = cpu.STORAGE.allocate(offsets_E1, 64, torch.bfloat16, torch.device("meta"))
    odd = sum(width % 2 for width in WIDTHS)
    assert list(weights) == ["packed"]
    assert weights["packed"].nbytes == 2 * 3 * 64 * (sum(WIDTHS) + odd) + 64
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
        (weight,) = cpu.STORAGE.allocate(offsets_E1, 70, torch.bfloat16, None).values()
        weight.zero_()
        cpu.STORAGE.write([weight], offsets_E1, 1, projection, view, atoms_F)
        packed.append(weight)
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], packed[2])
    assert packed[0].count_nonzero() == 37 * 70


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("hidden_size", [2, 62, 64, 152])
@pytest.mark.parametrize("turned", [False, True])
def test_codes_have_the_layout_of_weights(bits, hidden_size, turned):
    """They take half or a quarter of the space: read back as float16, one number each."""
    row_format = FP8 if bits == 8 else INT4
    generator = torch.Generator().manual_seed(0)
    offsets_E1 = torch.tensor([0, *WIDTHS]).cumsum(0)
    sizes = offsets_E1, hidden_size, torch.float16, None, True
    packed, plain = (cpu.STORAGE.allocate(*sizes, how)["packed"] for how in (row_format, PLAIN))
    assert packed.nbytes - 64 == (plain.nbytes - 64) * bits // 16
    packed[:-64] = 0xAA
    for expert, width in enumerate(WIDTHS):
        atoms_F = torch.randperm(FULL, generator=generator)[:width]
        for name in PROJECTIONS:
            shape = (hidden_size, FULL) if turned else (FULL, hidden_size)
            codes = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
            codes_IH = codes.t() if turned else codes
            where = offsets_E1, expert, name
            cpu.STORAGE.write([packed], *where, codes_IH, atoms_F, True, row_format)
            cpu.STORAGE.write([plain], *where, codes_IH.half(), atoms_F)
    found = Problem(
        unpack_codes_of_panels(packed[:-64], bits, offsets_E1, hidden_size), offsets_E1, {}
    )
    wanted = Problem(plain[:-32], offsets_E1, {})
    for expert in range(len(WIDTHS)):
        rows = unpack(found, expert, hidden_size)
        for name, rows_FH in unpack(wanted, expert, hidden_size).items():
            assert torch.equal(rows[name], rows_FH)


def unpack_codes_of_panels(packed, bits, offsets_E1, hidden_size):
    """Panels of codes as panels of float16, one number per code."""
    if bits == 8:
        return packed.half()
    panels, at = [], 0
    for width in offsets_E1.diff().tolist():
        atoms = (width + 1) // 2 * 2
        tiles = [2 * min(32, atoms - tile) for tile in range(0, atoms, 32)]
        blocks = [min(64, hidden_size - column) for column in range(0, hidden_size, 64)]
        for columns, summed in [*((t, hidden_size) for t in tiles), *((b, atoms) for b in blocks)]:
            panel = packed[at : at + columns * summed // 2].view(-1, columns)
            at += panel.numel()
            panels.append(torch.stack((panel & 15, panel >> 4), dim=1).flatten())
    assert at == len(packed)
    return torch.cat(panels).half()


def make_codes(row_format, dtype, widths=WIDTHS, hidden_size=152, storage=cpu.STORAGE):
    """Experts of random codes and scales; one slot uses all of their atoms, another some."""
    generator = torch.Generator().manual_seed(0)
    full = max(widths)
    keep_EI = torch.arange(full) < torch.tensor(widths)[:, None]
    some_EI = keep_EI & (torch.rand(keep_EI.shape, generator=generator) < 0.6)
    layout = build_layout({"all": keep_EI, "some": some_EI})
    packed = PackedExperts(layout, hidden_size, dtype, storage=storage, row_format=row_format)
    for expert, name in itertools.product(range(len(widths)), PROJECTIONS):
        atoms, columns = row_format.block(name)
        shape = -(-full // atoms), -(-hidden_size // columns)
        most = 120 if row_format.bits == 8 else 16
        codes = torch.randint(0, most, (full, hidden_size), generator=generator).to(torch.uint8)
        if row_format.bits == 8:
            codes += 128 * torch.randint(0, 2, codes.shape, generator=generator).to(torch.uint8)
        scales = torch.rand(shape, generator=generator) / 99
        zeros = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
        factor = torch.rand((), generator=generator) + 1
        encoded = Encoded(
            codes,
            scales.to(row_format.scale),
            zeros if row_format.zeros else None,
            factor if row_format.factor != "none" else None,
        )
        packed.load_encoded(expert, name, encoded)
    return packed


def run_codes(packed, x_TH, topk_weights_TK, ids_TK, threads=2, library=None, slots_T1=None):
    if slots_T1 is None:
        slots_T1 = torch.arange(len(x_TH), dtype=torch.int32)[:, None] % 2
    return (library or cpu._library()).fused_experts(
        x_TH,
        packed.weights[0],
        *packed.index,
        topk_weights_TK,
        with_slots(ids_TK, slots_T1),
        threads,
        scales=packed.scales,
        rows=packed.row_format.spec,
    )


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_format", [FP8, AWQ], ids=lambda it: it.spec)
@pytest.mark.parametrize("tokens", [4, 90])
def test_codes_give_the_same_bits_for_any_number_of_threads(isa, dtype, row_format, tokens):
    """Experts of few rows and of many, decoded in registers and ahead. Where rows are float32,
    these give the same bits too."""
    with forced(isa):
        packed = make_codes(row_format, dtype)
        x_TH, topk_weights_TK, ids_TK = make_input(tokens, len(WIDTHS), dtype=dtype)
        alone = run_codes(packed, x_TH, topk_weights_TK, ids_TK, threads=1)
        assert alone.isfinite().all()
        for threads in (2, 7):
            found = run_codes(packed, x_TH, topk_weights_TK, ids_TK, threads=threads)
            assert torch.equal(found, alone)
        if dtype != torch.bfloat16 or isa not in ("amx", "avx512_bf16"):
            some = slice(0, 4)
            found = run_codes(packed, x_TH[some], topk_weights_TK[some], ids_TK[some])
            assert torch.equal(found, alone[some])


@needs_library
@pytest.mark.parametrize("row_format", CODED, ids=lambda it: it.spec)
def test_long_experts_of_codes_are_summed_in_stretches(row_format):
    """Atoms of one slot lie in some of them only."""
    packed, oracle = (
        make_codes(row_format, torch.float32, (5001, 3), 64, storage)
        for storage in (cpu.STORAGE, reference.STORAGE)
    )
    mask_EI = torch.zeros(2, 5001).bool()
    mask_EI[0, 4500:4900] = True
    for experts in (packed, oracle):
        experts.set_slot(1, mask_EI)
    for tokens in (3, 12):
        arguments = make_input(tokens, 2, 64, torch.float32, k=2)
        for slot in range(2):
            slots_T1 = torch.full((tokens, 1), slot, dtype=torch.int32)
            found = run_codes(packed, *arguments, slots_T1=slots_T1)
            x_TH, topk_weights_TK, ids_TK = arguments
            wanted = reference.fused_experts(
                x_TH,
                oracle.weights,
                oracle.scales,
                [],
                *oracle.index,
                topk_weights_TK,
                with_slots(ids_TK, slots_T1),
                oracle.widest,
                oracle.activation.spec,
                row_format.spec,
            )
            assert_close(found, wanted.double())


@needs_library
@pytest.mark.parametrize("row_format", [FP8, AWQ], ids=lambda it: it.spec)
def test_codes_for_many_rows_give_the_bits_of_few(row_format):
    """More rows than share what is decoded; pieces end inside a slot's atoms and between them."""
    packed = make_codes(row_format, torch.float32, (701, 40), 264)
    mask_EI = torch.ones(2, 701).bool()
    mask_EI[0, 101:300] = mask_EI[0, 516:] = False
    packed.set_slot(1, mask_EI)
    arguments = make_input(600, 2, 264, torch.float32, k=2)
    together = run_codes(packed, *arguments)
    assert together.isfinite().all()
    for first in range(0, 600, 38):
        few = [tensor[first : first + 2] for tensor in arguments]
        assert torch.equal(run_codes(packed, *few), together[first : first + 2])


@needs_library
@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("weights", lambda it: it.view(torch.int8), "codes are torch.int8, wanted uint8"),
        ("weights", lambda it: it[:-1], "numbers for hidden size 152, wanted"),
        ("up_scales", lambda it: it.t().contiguous().t(), "wanted contiguous"),
        ("up_scales", lambda it: it[:, :-1].contiguous(), "up: scales are .*wanted"),
        ("up_scales", lambda it: it[:-1], "up: row [0-9]+ of [0-9]+ rows of scales"),
        ("gate_scales", lambda it: it.double(), "scales are torch.float64"),
        ("up_scales", lambda it: it.half(), r"up: scales are torch.float16 .*wanted torch.float32"),
        ("down_rows", lambda it: it.long(), "down: rows are torch.int64"),
        ("down_rows", lambda it: it[1:], "down: rows are torch.int16"),
        ("down_firsts", lambda it: it[1:], "down: firsts are torch.int32"),
        ("down_firsts", lambda it: it + 1, "down: row [0-9]+ of"),
        ("down_rows", lambda it: it - 1, "down: row -1 of"),
        ("down_rows", lambda it: it[:0], "down: firsts are torch.int32"),
        ("down_zeros", lambda it: it.new_zeros(7), "down: zeros are torch.uint8"),
        ("gate_zeros", lambda it: it.new_zeros(7), "e4m3 codes have no zeros"),
        ("up_factors", lambda it: it.new_zeros(9), "up: factors are torch.float32"),
        ("up_scales", lambda it: it.to("meta"), "on meta, wanted cpu"),
    ],
)
def test_invalid_scales_are_caught(table, change, said):
    packed = make_codes(FP8, torch.bfloat16)
    arguments = make_input(3, len(WIDTHS))
    run_codes(packed, *arguments)
    name = "packed" if table == "weights" else table
    changed = torch.nn.Parameter(change(getattr(packed, name).data), requires_grad=False)
    setattr(packed, name, changed)
    with pytest.raises(AssertionError, match=said):
        run_codes(packed, *arguments)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 200])
@pytest.mark.parametrize("hidden_size", [24, 152, 256])
def test_ragged_widths(dtype, tokens, hidden_size):
    problem = make_problem(hidden_size=hidden_size, dtype=dtype)
    arguments = make_input(tokens, len(WIDTHS), hidden_size, dtype)
    x_TH, topk_weights_TK, ids_TK = arguments
    expected = problem.expected(x_TH, topk_weights_TK, ids_TK)
    assert_close(run(problem, *arguments), expected)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_begin_and_end_inside_tiles(dtype):
    problem = make_problem((129, 160, 0, 33, 2), dtype=dtype)
    runs = [
        [(1, 2), (3, 5), (40, 60), (128, 1)],  # two in one tile, whole tiles between, the last
        [(0, 31), (32, 1), (63, 33), (151, 9)],  # an odd atom is left out, one is alone
        [],
        [(0, 1), (32, 1)],
        [(1, 1)],
    ]
    for tokens in (1, 50):
        x_TH, topk_weights_TK, ids_TK = make_input(tokens, 5, dtype=dtype)
        expected = problem.expected(x_TH, topk_weights_TK, ids_TK, runs)
        assert_close(run(problem, x_TH, topk_weights_TK, ids_TK, runs), expected)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_experts_are_summed_in_segments(dtype):
    problem = make_problem((5000,), hidden_size=64, dtype=dtype)
    runs = [[(3, 4990)]]
    x_TH, topk_weights_TK, ids_TK = make_input(9, 1, 64, dtype, k=2)
    expected = problem.expected(x_TH, topk_weights_TK, ids_TK, runs)
    assert_close(run(problem, x_TH, topk_weights_TK, ids_TK, runs), expected)


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
def test_a_tokens_result_does_not_depend_on_its_batch(dtype):
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
def test_nothing_remains_from_an_earlier_call():
    """Scratch of a call full of NaN, and an output that begins as NaN."""
    problem = make_problem()
    arguments = make_input(40, len(WIDTHS))
    runs = [[(width // 3, width // 3)] for width in WIDTHS]
    wanted = run(problem, *arguments, runs)
    everywhere = torch.full_like(arguments[0], torch.nan)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for threads in (2, 1):
            run(problem, everywhere, *arguments[1:], threads=threads)
            found = run(problem, *arguments, runs, threads=threads)
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
    x_TH *= 50 if dtype == torch.float16 else 1000  # as large as the output can be
    expected = problem.expected(x_TH, topk_weights_TK, ids_TK)
    assert_close(run(problem, x_TH, topk_weights_TK, ids_TK), expected)


@needs_library
def test_gates_of_any_size_equal_torch():
    """Each is the gate of its own expert, whose other factors are 1."""
    sizes = [0, 1e-30, 1, 50, 87, 90, 100, 1e4, 1e15, 1e30, torch.inf, torch.nan]
    gates_E = torch.tensor([sign * size for size in sizes for sign in (1, -1)])
    offsets_E1 = torch.arange(len(gates_E) + 1)
    (packed,) = cpu.STORAGE.allocate(offsets_E1, 2, torch.float32, None).values()
    for expert, gate in enumerate(gates_E):
        for name, row in {"gate": [gate, 0], "up": [1, 0], "down": [1, 0]}.items():
            rows_SH = torch.tensor([row], dtype=torch.float32)
            cpu.STORAGE.write([packed], offsets_E1, expert, name, rows_SH, torch.tensor([0]))
    ids_TK = torch.arange(len(gates_E))[:, None]
    x_TH, topk_weights_TK = torch.ones(len(gates_E), 2), torch.ones(len(gates_E), 1)
    problem = Problem(packed, offsets_E1, {})
    found_T = run(problem, x_TH, topk_weights_TK, ids_TK, threads=1)[:, 0]
    wanted_T = functional.silu(gates_E)
    assert torch.allclose(found_T, wanted_T, rtol=2e-6, atol=1e-35, equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["native", "emulated"])
def test_many_tokens_are_computed_in_chunks(dtype, variant, request):
    """Scratch is bounded: with 16 experts of this width per token, to about 100 tokens."""
    library = None if variant == "native" else request.getfixturevalue("emulated")
    problem = make_problem((20000, 7), hidden_size=2, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    x_TH = torch.randn(250, 2, generator=generator).to(dtype)
    topk_weights_TK = torch.rand(250, 16, generator=generator)
    ids_TK = (torch.rand(250, 16, generator=generator) < 0.9).long()
    expected = problem.expected(x_TH, topk_weights_TK, ids_TK)
    assert_close(run(problem, x_TH, topk_weights_TK, ids_TK, library=library), expected)


@needs_library
def test_bits_beyond_their_expert_are_ignored():
    """They would read other experts' weights."""
    problem = make_problem((40, 33, 64))
    x_TH, topk_weights_TK, ids_TK = make_input(7, 3)
    bits_SW = torch.full_like(problem.bits(problem.whole()), -1)
    arguments = bits_SW, problem.words, problem.offsets_E1, topk_weights_TK
    ids = with_slots(ids_TK, torch.zeros(1, dtype=torch.int32))
    found = cpu._library().fused_experts(x_TH, problem.packed, *arguments, ids, 2)
    assert torch.equal(found, run(problem, x_TH, topk_weights_TK, ids_TK))


@needs_library
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_TH": torch.ones(3, 152)}, "x is torch.float32, the weights are torch.bfloat16"),
        ({"x_TH": torch.ones(3, 150).bfloat16()}, "1856 numbers for hidden size 150, wanted 1832"),
        ({"x_TH": torch.ones(3, 152, device="meta").bfloat16()}, "on meta, wanted cpu"),
        ({"packed": torch.ones(464, 4).bfloat16().t()}, "wanted contiguous"),
        ({"offsets_E1": torch.tensor([0, 2, 4]).int()}, "offsets are torch.int32"),
        ({"words_E1": torch.tensor([0, 2])}, r"words are tensor\(\[2\]\), wanted"),
        ({"words_E1": torch.tensor([0, 1, 2]).int()}, "words are torch.int32"),
        ({"bits_SW": torch.zeros(16, 2).long()}, "bits are torch.int64, wanted int32"),
        ({"bits_SW": torch.zeros(16, 3).int()}, r"bits are \(16, 3\), wanted \(16, 2\)"),
        ({"bits_SW": torch.zeros(16, 4).int()[:, ::2]}, "wanted contiguous"),
        ({"topk_weights_TK": torch.ones(3, 3)}, r"router weights are .*\[3, 3\].*, ids .*\[3, 2\]"),
        ({"x_TH": torch.ones(4, 152).bfloat16()}, "3 rows of expert ids for 4 tokens"),
        ({"topk_ids_TK": torch.ones(3, 2)}, "expert ids are torch.float32"),
    ],
)
def test_invalid_arguments_are_caught(change, said):
    offsets_E1 = torch.tensor([0, 2, 4])
    right = {
        "x_TH": torch.ones(3, 152).bfloat16(),
        "packed": torch.ones(3 * 152 * 4 + 32).bfloat16(),
        "bits_SW": torch.full((16, 2), 3).int(),
        "words_E1": torch.tensor([0, 1, 2]),
        "offsets_E1": offsets_E1,
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
def test_invalid_rows_are_caught(rows_SH, atoms_F, said):
    with pytest.raises(AssertionError, match=said):
        cpu._library().pack(torch.ones(3 * 8 * 2).bfloat16(), 0, "gate", rows_SH, atoms_F, 1)


@needs_library
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer ends it")
def test_running_out_of_memory_raises():
    """Offsets of an expert so wide that no address space could hold its activations."""
    problem = make_problem((8, 4))
    x_TH, topk_weights_TK, ids_TK = make_input(3, 2)
    layer = problem.packed, problem.bits(problem.whole()), problem.words, problem.offsets_E1
    call = functools.partial(cpu._library().fused_experts, x_TH, *layer, topk_weights_TK)
    ids_TK = with_slots(ids_TK, torch.zeros(1, dtype=torch.int32))
    found = call(ids_TK, 2)
    problem.offsets_E1[2] = 1 << 52  # behind the back of what checks a layer, once
    with pytest.raises(MemoryError, match="no memory for the experts of 3 tokens"):
        call(torch.full((3, 3), 16), 2)
    problem.offsets_E1[2] = 12
    assert torch.equal(call(ids_TK, 2), found)


@needs_library
def test_weights_of_another_dtype_at_the_same_address():
    """Checks of a layer are cached by its addresses."""
    one, two = make_problem(dtype=torch.bfloat16), make_problem(dtype=torch.float16)
    index = one.bits(one.whole()), one.words, one.offsets_E1
    memory = one.packed
    for problem, dtype in ((one, torch.bfloat16), (two, torch.float16)):
        x_TH, topk_weights_TK, ids_TK = make_input(3, len(WIDTHS), dtype=dtype)
        packed = memory.view(dtype)
        packed.copy_(problem.packed)
        ids = with_slots(ids_TK, torch.zeros(1, dtype=torch.int32))
        found = cpu._library().fused_experts(x_TH, packed, *index, topk_weights_TK, ids, 2)
        assert_close(found, problem.expected(x_TH, topk_weights_TK, ids_TK))


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
    cpu._load.cache_clear()
    yield monkeypatch
    cpu._load.cache_clear()


@pytest.fixture
def fresh(unloaded, tmp_path):
    """Nothing is compiled yet either."""
    unloaded.setenv("ATOMIC_MOE_CACHE", str(tmp_path / "cache"))
    return unloaded


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits_for_any_number_of_threads(isa, dtype):
    """And for any batch; AMX sums in another order where there are few rows."""
    with forced(isa):
        problem = make_problem(dtype=dtype)
        x_TH, topk_weights_TK, ids_TK = make_input(70, len(WIDTHS), dtype=dtype)
        together = run(problem, x_TH, topk_weights_TK, ids_TK, threads=1)
        for threads in (2, 7):
            found = run(problem, x_TH, topk_weights_TK, ids_TK, threads=threads)
            assert torch.equal(found, together)
        if isa != "amx":
            some = slice(13, 18)
            found = run(problem, x_TH[some], topk_weights_TK[some], ids_TK[some])
            assert torch.equal(found, together[some])


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rest_of_the_batch_does_not_change_a_bit(isa, dtype):
    """Tokens of sixteen profiles at once, whose atoms lie in one another's tiles and gaps."""
    if isa == "amx" and dtype == torch.bfloat16:
        pytest.skip("AMX sums in another order where a block begins elsewhere")
    generator = torch.Generator().manual_seed(5)
    problem = make_problem((200, 2500, 64), hidden_size=66, dtype=dtype)
    bits_SW = problem.bits(problem.whole())
    bits_SW[1:] = (
        bits_SW[0]
        & torch.randint(-(1 << 31), 1 << 31, (15, bits_SW.shape[1]), generator=generator).int()
    )
    # Whole tiles out, so that segments differ.
    bits_SW[1:] *= (torch.rand(15, bits_SW.shape[1], generator=generator) < 0.5).int()
    x_TH, topk_weights_TK, ids_TK = make_input(48, 3, 66, dtype, k=2)
    slots_T1 = (torch.arange(48, dtype=torch.int32) * 5 % 16)[:, None]
    with forced(isa):

        def compute(tokens):
            return cpu._library().fused_experts(
                x_TH[tokens],
                problem.packed,
                bits_SW,
                problem.words,
                problem.offsets_E1,
                topk_weights_TK[tokens],
                with_slots(ids_TK, slots_T1)[tokens],
                2,
            )

        together = compute(slice(None))
        assert together[slots_T1[:, 0] > 0].count_nonzero()
        for slot in range(16):
            tokens = (slots_T1[:, 0] == slot).nonzero().flatten()
            assert torch.equal(compute(tokens), together[tokens])


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
    runs = [[(width // 3, width - width // 3)] for width in WIDTHS]
    expected = problem.expected(*arguments, runs)
    before = emulated.functions.amx_products()
    found = run(problem, *arguments, runs, library=emulated)
    assert_close(found, expected)
    assert (emulated.functions.amx_products() > before) == (tokens >= 50)
    for threads in (1, 3):
        assert torch.equal(run(problem, *arguments, runs, threads=threads, library=emulated), found)


@needs_library
def test_amx_in_emulation_is_the_same_for_any_number_of_threads_and_mix(emulated):
    """Ranges of tokens, and so the rows of a block, depend on the threads; sums must not."""
    problem = make_problem()
    bits_SW = problem.bits(problem.whole())
    generator = torch.Generator().manual_seed(6)
    random_SW = torch.randint(-(1 << 31), 1 << 31, bits_SW.shape, generator=generator).int()
    bits_SW[1:] = bits_SW[0] & random_SW[1:]
    bits_SW[1:] *= (torch.rand(15, bits_SW.shape[1], generator=generator) < 0.5).int()
    x_TH, topk_weights_TK, ids_TK = make_input(200, len(WIDTHS))
    slots_T1 = (torch.arange(200, dtype=torch.int32) * 5 % 16)[:, None]

    def compute(slots_T1, threads):
        index = bits_SW, problem.words, problem.offsets_E1
        ids = with_slots(ids_TK, slots_T1)
        return emulated.fused_experts(x_TH, problem.packed, *index, topk_weights_TK, ids, threads)

    found = compute(slots_T1, 1)
    for threads in (3, 7):
        assert torch.equal(compute(slots_T1, threads), found)
    alone = compute(torch.full_like(slots_T1, 5), 2)
    assert torch.equal(alone[slots_T1[:, 0] == 5], found[slots_T1[:, 0] == 5])


@needs_library
@pytest.mark.parametrize("row_format", CODED, ids=lambda it: it.spec)
def test_amx_in_emulation_takes_decoded_codes(emulated, row_format):
    packed = make_codes(row_format, torch.bfloat16)
    for tokens in (2, 90):
        arguments = make_input(tokens, len(WIDTHS))
        before = emulated.functions.amx_products()
        found = run_codes(packed, *arguments, library=emulated)
        assert (emulated.functions.amx_products() > before) == (tokens > 2)
        assert_close(found, run_codes(packed, *arguments).double())
        for threads in (1, 3):
            assert torch.equal(run_codes(packed, *arguments, threads, emulated), found)


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
    assert cpu.unavailable(cpu_device, torch.float64).startswith("torch.float64 weights, not")
    monkeypatch.setattr(cpu_library, "cpu_flags", frozenset)
    cpu._load.cache_clear()
    assert "has neither AVX2 with FMA and F16C nor NEON" in cpu.unavailable(
        cpu_device, torch.bfloat16
    )
    cpu._load.cache_clear()


def test_a_missing_instruction_set_is_reported(unloaded):
    """Refused: otherwise a typo would measure the slow loop."""
    unloaded.setenv("ATOMIC_MOE_CPU_ISA", "mmx")
    said = f"ATOMIC_MOE_CPU_ISA is 'mmx', this processor has {', '.join(USABLE)}; name one"
    with pytest.raises(ValueError, match=said):
        choose_backend(torch.device("cpu"), torch.bfloat16)


def test_the_quota_of_a_container_is_read(monkeypatch, tmp_path):
    for quota, workers in (("max 100000", 1 << 16), ("150000 100000", 2), ("10000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(cpu_library, "CGROUP", tmp_path)
        cpu_library.quota.cache_clear()
        assert cpu_library.quota() == workers
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, workers in (("-1\n", 1 << 16), ("300000\n", 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        cpu_library.quota.cache_clear()
        assert cpu_library.quota() == workers
    cpu_library.quota.cache_clear()


@needs_library
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_quota_idles_threads_and_changes_no_bit(monkeypatch, tokens):
    problem = make_problem()
    arguments = make_input(tokens, len(WIDTHS))
    wanted = run(problem, *arguments, threads=4)
    for workers in (1, 2):
        monkeypatch.setattr(cpu_library, "quota", lambda workers=workers: workers)
        assert torch.equal(run(problem, *arguments, threads=4), wanted)
        one = make_problem()
        assert torch.equal(one.packed, problem.packed)


@needs_library
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("name", [v.name for v in cpu_library.variants_of_machine()])
def test_every_variant_parses(compiler, name):
    """Also those that do not run here; without the emulation, which replaces AMX's macros."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    include = "-isystem", str(Path(torch.__file__).parent / "include")
    flags = [*cpu_library.COMMON_FLAGS, *VARIANTS[name].compiler_flags, "-fsyntax-only"]
    command = [compiler, *flags, *include, str(cpu_library.SOURCES[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_library
@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
def test_clang_builds_it_too(fresh):
    fresh.setenv("CXX", "clang++")
    library = Library(cpu_library.build(VARIANTS[LOWEST]))
    cpu._check(library)


@pytest.mark.parametrize(
    ("installed", "compiler"), [(("g++", "clang++"), "g++"), (("clang++",), "clang++"), ((), "g++")]
)
def test_the_installed_compiler_is_used(fresh, installed, compiler):
    fresh.delenv("CXX", raising=False)
    fresh.setattr(shutil, "which", lambda name: name if name in installed else None)
    assert cpu_library._installed_compiler() == compiler


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C++ compiler: no-such-compiler not found; install g++ or set CXX"),
        ("false", "the C++ compiler false failed"),
        ("g++ -DPlan=7", "error: expected"),
    ],
)
def test_missing_or_broken_compilers(fresh, compiler, reason):
    fresh.setenv("CXX", compiler)
    assert reason in cpu.unavailable(torch.device("cpu"), torch.bfloat16)


def test_an_unwritable_cache(fresh, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert "set ATOMIC_MOE_CACHE" in cpu.unavailable(torch.device("cpu"), torch.bfloat16)


def test_a_user_without_a_home(fresh):
    for name in ("ATOMIC_MOE_CACHE", "XDG_CACHE_HOME", "HOME"):
        fresh.delenv(name, raising=False)
    fresh.setattr("pwd.getpwuid", dict[int, None]().__getitem__)  # KeyError
    reason = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
    assert reason == "this user has no home directory to compile into; set ATOMIC_MOE_CACHE"


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_cache_writable_by_others_is_refused(fresh, tmp_path, mode):
    """Libraries in the cache run in this process."""
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
    """If the library exists, not even a lock is opened."""
    library = cpu_library.build(VARIANTS[LOWEST])
    library.with_suffix(".lock").unlink()
    library.parent.chmod(0o555)
    fresh.setenv("PATH", "")
    assert cpu_library.build(VARIANTS[LOWEST]) == library
    assert list(library.parent.iterdir()) == [library]


def test_the_lock_does_not_follow_links(fresh, tmp_path):
    library = cpu_library.build(VARIANTS[LOWEST])
    assert library.parent.stat().st_mode & 0o022 == library.stat().st_mode & 0o022 == 0
    other, lock = tmp_path / "other", library.with_suffix(".lock")
    other.write_text("kept")
    library.unlink()
    lock.unlink()
    lock.symlink_to(other)
    with pytest.raises(VariantError, match=r"cannot use .*symbolic links.*; set ATOMIC_MOE_CACHE"):
        cpu_library.build(VARIANTS[LOWEST])
    assert other.read_text() == "kept"


def test_an_unloadable_library_is_compiled_again(fresh):
    fresh.setattr(cpu_library, "COMMON_FLAGS", (*cpu_library.COMMON_FLAGS, "-O0"))
    library = cpu_library.build(VARIANTS[LOWEST])
    library.write_text("from another system")
    with fresh.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(VariantError, match=r"no C\+\+ compiler"):
            cpu_library.load(VARIANTS[LOWEST])
    assert cpu_library.load(VARIANTS[LOWEST]).functions


@pytest.mark.parametrize(
    "name", ["platform.libc_ver", "vllm_atomic_moe.experts.backends.cpu.library._openmp"]
)
def test_another_system_has_its_own_libraries(fresh, name, tmp_path):
    fresh.setattr(cpu_library, "_compile", lambda command: Path(command[-3]).touch())
    fresh.setattr(cpu_library, "_openmp", lambda: ["/a/libgomp.so.1", "-Wl,--as-needed"])
    before = cpu_library.build(VARIANTS[LOWEST])
    assert cpu_library.build(VARIANTS[LOWEST]) == before
    fresh.setattr(name, lambda: ["/a/libgomp-1234.so.1", "-Wl,--as-needed"])
    assert cpu_library.build(VARIANTS[LOWEST]) != before


def build_ahead():
    command = [sys.executable, "-m", "vllm_atomic_moe.experts.backends.cpu"]
    return subprocess.run(command, capture_output=True, text=True)


def test_building_ahead_skips_unsupported_variants(fresh, tmp_path):
    """The compiler here is a stand-in that accepts only variants without bf16 instructions."""
    compiler = tmp_path / "old-compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *bf16*) echo "error: unknown option" >&2; exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
    )
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    said = build_ahead()
    assert said.returncode == 0, said.stderr
    built = [Path(line).name.split("-")[1] for line in said.stdout.splitlines()]
    all_here = [variant.name for variant in cpu_library.variants_of_machine()]
    wide = [name for name in all_here if name in ("amx", "avx512_bf16")]
    assert built == [name for name in all_here if name not in wide]
    assert [line.split(":")[0] for line in said.stderr.splitlines()] == wide
    fresh.setenv("CXX", "no-such-compiler")
    assert build_ahead().returncode == 1


@needs_library
def test_a_library_that_computes_wrongly_is_not_used(unloaded, caplog):
    right = Library.fused_experts

    def wrongly_by(factor):
        return lambda *arguments, **more: right(*arguments, **more) * factor

    unloaded.setattr(Library, "fused_experts", wrongly_by(2))
    with caplog.at_level(logging.WARNING):
        reason = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
    assert reason.startswith("its self-check failed: relative error 1.0e+00")
    assert "its self-check failed" in caplog.text
    unloaded.setattr(Library, "fused_experts", wrongly_by(torch.nan))
    cpu._load.cache_clear()
    assert "relative error nan" in cpu.unavailable(torch.device("cpu"), torch.bfloat16)


def test_two_processes_compile_once_and_a_prebuilt_library_needs_no_compiler(fresh, tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho called >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    code = (
        "from vllm_atomic_moe.experts.backends.cpu import library; "
        "print(library.build(library.usable_variants()[-1]))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in both}
    assert len(paths) == 1
    assert log.read_text().splitlines() == ["called"]
    compiler.unlink()
    assert str(cpu_library.build(VARIANTS[LOWEST])) in paths


@needs_library
def test_the_process_has_one_openmp_runtime():
    code = (
        "import torch; from vllm_atomic_moe.experts.backends import cpu; "
        "from vllm_atomic_moe.experts.backends.cpu import library; "
        "before = library._openmp_runtimes(); cpu._library(); "
        "assert before == library._openmp_runtimes() and len(before) == 1, before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
