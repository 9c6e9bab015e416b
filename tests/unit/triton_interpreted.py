"""The Triton kernels against a float64 loop, on the CPU, through Triton's interpreter.

For a process of its own, since the interpreter must be chosen before Triton is imported:
`TRITON_INTERPRET=1 python -m pytest tests/unit/triton_interpreted.py`; test_kernels_triton.py does that.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

from vllm_atomic_moe.kernels import triton as backend

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"

WIDTHS, FULL, H = (0, 1, 31, 32, 33, 127, 128, 129, 160), 160, 40
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}
both_forms = pytest.mark.parametrize("one_kernel", [False, True])


def make_experts(runs: list[list[tuple[int, int]]], num_rows: int, dtype: torch.dtype):
    """Random packed rows [P, H], and the runs: int32 [E, R, 2]."""
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(num_rows, H, generator=generator) / H**0.5).to(dtype) for _ in range(3)]
    return weights, torch.tensor(runs, dtype=torch.int32)


def ragged(dtype: torch.dtype):
    """Experts of all WIDTHS, one run each. The rows between them are poisoned."""
    runs, row = [], 0
    for width in WIDTHS:
        runs.append([(row, width)])
        row += width + 2
    weights, runs_ER2 = make_experts(runs, row, dtype)
    unused = torch.ones(row, dtype=torch.bool)
    for first, width in runs_ER2[:, 0].tolist():
        unused[first : first + width] = False
    for weight in weights:
        weight[unused] = float("nan")
    return weights, runs_ER2


def make_tokens(T: int, K: int, E: int, dtype: torch.dtype):
    """Activations, router weights and ids; ids repeat, and some are -1 or foreign."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(T, H, generator=generator).to(dtype)
    ids_TK = torch.randint(-1, E + 2, (T, K), generator=generator).int()
    return x_TH, torch.rand(T, K, generator=generator), ids_TK


def slow(x_TH, weights, runs_ER2, topk_weights_TK, topk_ids_TK) -> torch.Tensor:
    """One token and expert after another, in float64."""
    gate, up, down_t = (weight.double() for weight in weights)
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for token, (ids, topk_weights) in enumerate(zip(topk_ids_TK, topk_weights_TK, strict=True)):
        for expert, weight in zip(ids.tolist(), topk_weights.tolist(), strict=True):
            for first, length in runs_ER2[expert].tolist() if 0 <= expert < len(runs_ER2) else ():
                rows = slice(first, first + length)
                x = x_TH[token].double()
                h = functional.silu(gate[rows] @ x) * (up[rows] @ x)
                out_TH[token] += weight * (h @ down_t[rows])
    return out_TH


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def launch(one_kernel: bool, x_TH, weights, runs_ER2, topk_weights_TK, topk_ids_TK):
    """That form, with the tiles the shapes choose."""
    per_expert = -(-topk_ids_TK.numel() // len(runs_ER2))
    tiles = backend.choose_tiles(per_expert, x_TH.dtype)
    return backend.launch(
        x_TH, weights, runs_ER2, topk_weights_TK, topk_ids_TK, FULL, tiles, one_kernel
    )


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# Unsorted rows, one block an expert, several blocks, larger blocks; one expert a token.
@pytest.mark.parametrize(("T", "K"), [(1, 2), (1, 12), (7, 12), (50, 6), (9, 1)])
def test_any_width(T, K, dtype, one_kernel):
    weights, runs_ER2 = ragged(dtype)
    tokens = make_tokens(T, K, len(WIDTHS), dtype)
    wanted = slow(tokens[0], weights, runs_ER2, *tokens[1:])
    check(launch(one_kernel, tokens[0], weights, runs_ER2, *tokens[1:]), wanted, dtype)


@both_forms
@pytest.mark.parametrize("tiles", [tiles for _, tiles in backend.TILES], ids=str)
def test_all_tiles(tiles, one_kernel):
    weights, runs_ER2 = ragged(torch.float16)
    x_TH, *routing = make_tokens(5, 4, len(WIDTHS), torch.float16)
    found = backend.launch(x_TH, weights, runs_ER2, *routing, FULL, tiles, one_kernel)
    check(found, slow(x_TH, weights, runs_ER2, *routing), torch.float16)


@both_forms
def test_switching_rewrites_runs_in_place(one_kernel):
    """Several runs an expert, empty ones among them, of lengths that are no multiple of a vector."""
    profiles = [
        [[(0, 33), (40, 7), (0, 0)], [(60, 0), (61, 1), (70, 50)], [(0, 0), (0, 0), (0, 0)]],
        [[(3, 2), (0, 0), (5, 35)], [(60, 60), (0, 0), (0, 0)], [(120, 1), (122, 1), (124, 16)]],
    ]
    weights, runs_ER2 = make_experts(profiles[0], 140, torch.float32)
    x_TH, *routing = make_tokens(6, 2, 3, torch.float32)
    for profile in [*profiles, profiles[0]]:
        runs_ER2.copy_(torch.tensor(profile))
        found = launch(one_kernel, x_TH, weights, runs_ER2, *routing)
        check(found, slow(x_TH, weights, runs_ER2, *routing), torch.float32)


@both_forms
@pytest.mark.parametrize("ids", [torch.full((4, 2), -1), torch.full((4, 2), 2**40)], ids=str)
def test_nothing_routed_here(ids, one_kernel):
    weights, runs_ER2 = ragged(torch.float32)
    found = launch(one_kernel, torch.randn(4, H), weights, runs_ER2, torch.rand(4, 2), ids)
    assert torch.equal(found, torch.zeros(4, H))


@pytest.mark.parametrize("widest", [0, FULL])
def test_everything_pruned(widest):
    """No rows are resident, or the active profile uses none of those that are."""
    weights, runs_ER2 = make_experts([[(0, 0)]] * 3, widest, torch.float32)
    x_TH, *routing = make_tokens(4, 2, 3, torch.float32)
    found = backend.fused_experts(x_TH, weights, runs_ER2, *routing, widest)
    assert torch.equal(found, torch.zeros(4, H))


def test_no_tokens():
    weights, runs_ER2 = ragged(torch.float16)
    tokens = make_tokens(0, 2, len(WIDTHS), torch.float16)
    found = backend.fused_experts(tokens[0], weights, runs_ER2, *tokens[1:], FULL)
    assert found.shape == (0, H)
    assert found.dtype == torch.float16


@both_forms
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_strides_and_dtypes_of_the_arguments(one_kernel, ids_dtype):
    weights, runs_ER2 = ragged(torch.float16)
    x_TH, topk_weights_TK, ids_TK = make_tokens(6, 4, len(WIDTHS), torch.float16)
    wanted = launch(one_kernel, x_TH, weights, runs_ER2, topk_weights_TK.half(), ids_TK)
    columns, rows = torch.zeros(6, 2 * H).half(), torch.zeros(6, H + 3).half()
    columns[:, ::2], rows[:, :H] = x_TH, x_TH
    for strided in (columns[:, ::2], rows[:, :H]):
        found = launch(
            one_kernel,
            strided,
            weights,
            runs_ER2,
            topk_weights_TK.t().contiguous().t().half(),
            ids_TK.t().contiguous().t().to(ids_dtype),
        )
        assert torch.equal(found, wanted) or one_kernel
        torch.testing.assert_close(found, wanted)


def test_deterministic_form_is_chosen_and_repeats(monkeypatch):
    weights, runs_ER2 = ragged(torch.float32)
    tokens = make_tokens(3, 3, len(WIDTHS), torch.float32)
    assert tokens[2].numel() <= len(WIDTHS), "else one kernel would not be chosen anyway"
    forms = []
    for name in ("_one_kernel", "_two_kernels"):
        form = getattr(backend, name)
        monkeypatch.setattr(
            backend, name, lambda *args, form=form: forms.append(form) or form(*args)
        )
    found = []
    for deterministic in (False, True, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            found.append(backend.fused_experts(tokens[0], weights, runs_ER2, *tokens[1:], FULL))
        finally:
            torch.use_deterministic_algorithms(False)
    assert [form.__name__ for form in forms] == ["_one_kernel", "_two_kernels", "_two_kernels"]
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_sorted_rows(block, ids_dtype):
    """Every routed row stands once, in order, in a block of its expert; the rest is padding."""
    E, N = 5, 1500
    ids_N = torch.randint(-1, E + 1, (N,), generator=torch.Generator().manual_seed(3))
    ids_N[ids_N == 3] = 2
    tiles = backend.TILES[0][1]._replace(rows=block)
    runs_ER2 = torch.zeros(E, 1, 2, dtype=torch.int32)
    routing = backend._sort_rows(ids_N.view(-1, 2).to(ids_dtype), runs_ER2, tiles)
    wanted = []
    for expert in range(E):
        rows = (ids_N == expert).nonzero().flatten().tolist()
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            wanted.append((expert, part + [N] * (block - len(part))))
    found = list(zip(routing.experts.tolist(), routing.rows.view(-1, block).tolist(), strict=True))
    assert found[: len(wanted)] == wanted
    assert all(expert == -1 for expert, _ in found[len(wanted) :])
