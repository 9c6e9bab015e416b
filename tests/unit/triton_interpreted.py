"""The Triton kernels on the CPU, through Triton's interpreter.

For a process of its own, since the interpreter must be chosen before Triton is imported:
`TRITON_INTERPRET=1 python -m pytest tests/unit/triton_interpreted.py`. test_kernels_triton.py does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.kernel_suite import WIDTHS, KernelSuite, make_experts, ragged, routed
from vllm_atomic_moe.experts.backends import triton as triton_backend
from vllm_atomic_moe.experts.packing import SLOTS, with_slots

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"


class TestTriton(KernelSuite):
    """Everything in both forms, whatever the shapes would choose."""

    backend = "triton"

    @pytest.fixture(autouse=True, scope="class", params=["two kernels", "one kernel"])
    def _form(self, request: pytest.FixtureRequest) -> Iterator[None]:
        one = request.param == "one kernel"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_backend, "ONE_KERNEL_ROWS", 1 << 30 if one else 0)
            # One dtype each, for time: the interpreter takes milliseconds for every program.
            patch.setattr(request.cls, "dtypes", (torch.float16 if one else torch.float32,))
            yield

    @pytest.mark.parametrize("tiles", [tiles for _, tiles in triton_backend.TILES], ids=str)
    def test_all_tiles(self, tiles, monkeypatch):
        monkeypatch.setattr(triton_backend, "TILES", ((None, tiles),))
        make_experts({"a": ragged()}, torch.float16, "triton").check(
            *routed(5, 4, len(WIDTHS), torch.float16)
        )


@pytest.mark.parametrize("one_kernel", [False, True])
def test_weights_of_more_than_2_31_elements(one_kernel):
    """Only the last rows are ever touched, so that they alone take memory."""
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
        bits_SW,
        words_E1,
        offsets_E1,
        torch.ones(1, 1),
        ids_TK,
        33,
        tiles,
        one_kernel,
    )
    used = weight_PH[-33:].double()
    product = x_TH.double() @ used.t()
    wanted = (torch.nn.functional.silu(product) * product) @ used
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
    """Not ours, whether rows are sorted or not."""
    experts = make_experts({"a": ragged()}, torch.float16, "triton")
    ids = torch.full((T, 2), (1 << 32) + 5)
    found = experts(torch.randn(T, 24).half(), torch.rand(T, 2), ids)
    assert torch.equal(found, torch.zeros(T, 24).half())


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_sorted_rows(block, ids_dtype):
    """Every routed row stands once, in order, in a block of its expert; the rest is padding."""
    E, N = 5, 5000
    ids_N = torch.randint(-1, E + 1, (N,), generator=torch.Generator().manual_seed(3))
    ids_N[ids_N == 3] = 2
    tiles = triton_backend.TILES[0][1]._replace(rows=block)
    slots_N = torch.randint(0, SLOTS, (N,), generator=torch.Generator().manual_seed(4))
    ids_TK = with_slots(ids_N, slots_N).view(-1, 2).to(ids_dtype)
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
