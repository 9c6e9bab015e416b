"""The Triton kernels on the CPU, through Triton's interpreter.

For a process of its own, since the interpreter must be chosen before Triton is imported:
`TRITON_INTERPRET=1 python -m pytest tests/unit/triton_interpreted.py`. test_kernels_triton.py does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from tests.kernel_suite import (
    ACTIVATIONS,
    TOLERANCE,
    WIDTHS,
    Experts,
    KernelSuite,
    make_experts,
    poisoned_memory,
    ragged,
    routed,
)
from tests.quantized import FORMATS
from tests.triton_decoding import DECODED, check_decoding
from vllm_atomic_moe.experts.activation import SILU, Activation
from vllm_atomic_moe.experts.backends import reference
from vllm_atomic_moe.experts.backends import triton as triton_backend
from vllm_atomic_moe.experts.packing import SLOTS, with_slots
from vllm_atomic_moe.files.row_formats import PLAIN

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"


class TestTriton(KernelSuite):
    """Everything in both forms, whichever the shapes would choose."""

    backend = "triton"

    @pytest.fixture(autouse=True, scope="class", params=["two kernels", "one kernel"])
    def _form(self, request: pytest.FixtureRequest) -> Iterator[None]:
        one = request.param == "one kernel"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_backend, "ONE_KERNEL_ROWS", 1 << 30 if one else 0)
            # One dtype each, for time: the interpreter takes milliseconds for every program.
            patch.setattr(request.cls, "dtypes", (torch.float16 if one else torch.float32,))
            yield

    # Tiles of all formats are decoded below; these have scales of atoms, zero points, and a factor.
    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name in ("awq", "nvfp4") else pytest.mark.full)
            for name in FORMATS
        ],
    )
    def test_rows_of_codes(self, name: str) -> None:
        super().test_rows_of_codes(name)

    @pytest.mark.parametrize(
        ("name", "activation"),
        [
            pytest.param(
                *(name, activation),
                id=f"{name}-{activation.spec}",
                marks=[] if name == "awq" and activation.kind == "relu2" else pytest.mark.full,
            )
            for name in FORMATS
            for activation in ACTIVATIONS
        ],
    )
    def test_codes_with_every_activation(self, name: str, activation: Activation) -> None:
        super().test_codes_with_every_activation(name, activation)

    # Half a minute each; kernels do not know of ranks. These two have tables of all kinds.
    @pytest.mark.parametrize(
        "name",
        [PLAIN.code, *(pytest.param(it, marks=pytest.mark.full) for it in ("awq", "nvfp4"))],
    )
    def test_ranks_add_up(self, name: str) -> None:
        super().test_ranks_add_up(name)

    @pytest.mark.parametrize("tiles", [tiles for _, tiles in triton_backend.TILES], ids=str)
    def test_all_tiles(self, tiles, monkeypatch):
        monkeypatch.setattr(triton_backend, "TILES", ((None, tiles),))
        make_experts({"a": ragged()}, torch.float16, "triton").check(
            *routed(5, 4, len(WIDTHS), torch.float16)
        )

    @pytest.mark.parametrize("atoms", [32, 64])
    def test_skipped_tiles(self, atoms, monkeypatch):
        """Words and tiles without atoms before, between and after others, in one slot or in all.

        What skipped tiles leave unwritten is NaN. h is written and read in tiles of two sizes.
        """
        tiles = triton_backend.TILES[0][1]._replace(atoms=atoms, out_atoms=96 - atoms)
        monkeypatch.setattr(triton_backend, "TILES", ((None, tiles),))
        experts = stretches()
        names = list(experts.masks)
        x, weights, ids = routed(len(names), 3, 4, torch.float16)
        # Poisoned memory comes with two kernels; one has nothing that could be left unwritten.
        one_kernel = triton_backend.ONE_KERNEL_ROWS > 0
        with nullcontext() if one_kernel else poisoned_memory():
            experts.check(x, weights, ids, names)
            for name in names:
                experts.check(x, weights, ids, name)
                experts.check(x[:1], weights[:1, :1], ids[:1, :1], name)

    def test_atoms_of_other_slots_do_not_leak(self):
        """They are infinite, and computed in the same tile."""
        experts = stretches()
        names = list(experts.masks)
        arguments = routed(len(names), 3, 4, torch.float16, foreign=False)
        before = experts(*arguments, names)
        theirs = experts.masks["middle"] & ~experts.masks["gap"] & ~experts.masks["ends"]
        for rows_PH in experts.packed.weights[:2]:
            rows_PH[theirs.flatten()] = float("inf")
        after = experts(*arguments, names)
        for token, name in enumerate(names):
            if name == "middle":
                assert not after[token].isfinite().all()
            else:
                assert torch.equal(after[token], before[token])


def stretches() -> Experts:
    """Four experts of 150 atoms, packed in order, whatever the profiles keep."""
    kept = {
        "ends": [range(1), range(149, 150)],
        "gap": [range(3, 36), range(100, 150)],
        "middle": [range(64, 104)],
        "none": [],
    }
    everything = torch.ones(4, 150, dtype=torch.bool)
    experts = make_experts(dict.fromkeys(kept, everything), torch.float16, "triton")
    masks = {name: torch.zeros_like(everything) for name in kept}
    for slot, (name, atoms) in enumerate(kept.items()):
        masks[name][:, list(itertools.chain(*atoms))] = True
        bits = functional.pad(masks[name], (0, 10)).view(-1, 32).long()
        experts.packed.bits_SW[slot] = (bits << torch.arange(32)).sum(dim=1).int()
    return replace(experts, masks=masks)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", DECODED)
def test_codes_are_decoded_as_by_the_reference(name, dtype):
    check_decoding(name, dtype)


@pytest.mark.parametrize("out_atoms", [32, 64])
def test_experts_of_more_than_64_words(out_atoms):
    """Down takes 64 words at a time: test atoms in the last of these and the first of the next."""
    H, F = 16, 5000
    words = -(-F // 32)
    bits_SW = torch.zeros(SLOTS, words, dtype=torch.int32)
    bits_SW[1, [0, 31, 62, 63, 64]] = torch.tensor(
        [1, -1, -1 << 31, -1 << 29, 1], dtype=torch.int32
    )
    bits_SW[2, [63, words - 1]] = -1
    index = bits_SW, torch.tensor([0, words]), torch.tensor([0, F])
    weights = [torch.randn(F, H) for _ in range(3)]
    x_TH, ids_TK = torch.randn(3, H), torch.tensor([[1], [2], [0]], dtype=torch.int32)
    arguments = x_TH, weights, [], [], *index, torch.ones(3, 1), ids_TK, F, SILU.spec, PLAIN.spec
    tiles = triton_backend.Tiles(16, 64, 16, 16, out_atoms, warps=4, stages=3)
    with poisoned_memory():
        found = triton_backend.launch(*arguments, tiles, one_kernel=False)
    wanted = reference.fused_experts(*arguments)
    assert (found - wanted).norm() <= TOLERANCE[torch.float32] * wanted.norm()


@pytest.mark.parametrize("one_kernel", [False, True])
def test_weights_of_more_than_2_31_elements(one_kernel):
    """Only the last rows are ever touched, so only they take memory."""
    H, rows = 512, (1 << 22) + 40
    weight_PH = torch.empty(rows, H, dtype=torch.float16)
    weight_PH[-40:] = torch.randn(40, H) * H**-0.5
    offsets_E1 = torch.tensor([rows - 40, rows - 33, rows])
    words_E1 = torch.tensor([0, 1, 3])
    bits_SW = torch.zeros(SLOTS, 3, dtype=torch.int32)
    bits_SW[2] = -1
    x_TH, ids_TK = torch.randn(1, H).half(), torch.tensor([[1 * SLOTS + 2]])
    tiles = triton_backend.choose_tiles(1, torch.float16)
    found = triton_backend.launch(
        x_TH,
        [weight_PH] * 3,
        [],
        [],
        bits_SW,
        words_E1,
        offsets_E1,
        torch.ones(1, 1),
        ids_TK,
        33,
        SILU.spec,
        PLAIN.spec,
        tiles,
        one_kernel,
    )
    used = weight_PH[-33:].double()
    product = x_TH.double() @ used.t()
    wanted = (functional.silu(product) * product) @ used
    assert (found.double() - wanted).norm() <= 1e-3 * wanted.norm()


def test_deterministic_form_is_chosen_and_repeats(monkeypatch):
    experts = make_experts({"a": ragged()}, torch.float32, "triton")
    tokens = routed(3, 3, len(WIDTHS), torch.float32)
    forms = []
    for name in ("_one_kernel", "_two_kernels"):
        form = getattr(triton_backend, name)
        monkeypatch.setattr(
            triton_backend,
            name,
            lambda *args, form=form: forms.append(form.__name__) or form(*args),
        )
    found = []
    for deterministic in (False, True, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            found.append(experts(*tokens))
        finally:
            torch.use_deterministic_algorithms(False)
    assert forms == ["_one_kernel", "_two_kernels", "_two_kernels"]
    assert torch.equal(found[1], found[2])
    named = make_experts({"a": ragged()}, torch.float32, "triton_deterministic")
    assert torch.equal(named(*tokens), found[1])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("T", [1, 8])
def test_ids_beyond_32_bits(T):
    """They belong to no expert, whether rows are sorted or not."""
    experts = make_experts({"a": ragged()}, torch.float16, "triton")
    ids = torch.full((T, 2), (1 << 32) + 5)
    found = experts(torch.randn(T, 24).half(), torch.rand(T, 2), ids)
    assert torch.equal(found, torch.zeros(T, 24).half())


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_sorted_rows(block, ids_dtype):
    """Every routed row appears once, in order, in a block of its expert, whatever its slot."""
    E, N = 5, 5000
    ids_N = torch.randint(-1, E + 1, (N,), generator=torch.Generator().manual_seed(3))
    ids_N[ids_N == 3] = 2
    slots_N = torch.arange(N, dtype=torch.int32) % SLOTS
    ids_TK = with_slots(ids_N, slots_N).view(-1, 2).to(ids_dtype)
    tiles = triton_backend.TILES[0][1]._replace(rows=block)
    routing = triton_backend._sort_rows(ids_TK, E, tiles)
    wanted = []
    for expert in range(E):
        rows = (ids_N == expert).nonzero().flatten().tolist()
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            wanted.append((expert, part + [N] * (block - len(part))))
    found = list(zip(routing.experts.tolist(), routing.rows.view(-1, block).tolist(), strict=True))
    assert found[: len(wanted)] == wanted
    assert all(expert == -1 for expert, _ in found[len(wanted) :])
