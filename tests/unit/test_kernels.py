"""The reference kernel against float64 einsum over masked dense experts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vllm_atomic_moe.kernels import fused_experts
from vllm_atomic_moe.packing import PackedExperts, build_layout

WIDTHS = (0, 1, 31, 32, 33, 127, 128, 129, 160)
FULL, H = 160, 24


def make_experts(masks: dict[str, torch.Tensor], dtype: torch.dtype):
    """Packed experts of random weights, and those weights: gate, up, down [E, I, H]."""
    generator = torch.Generator().manual_seed(0)
    num_experts = next(iter(masks.values())).shape[0]
    gate, up, down_t = (
        torch.randn(num_experts, FULL, H, generator=generator).to(dtype) / H**0.5 for _ in range(3)
    )
    packed = PackedExperts(build_layout(masks), H, dtype)
    for expert in range(num_experts):
        packed.load_expert(expert, "gate", gate[expert])
        packed.load_expert(expert, "up", up[expert])
        packed.load_expert(expert, "down", down_t[expert].t())
    return packed, (gate, up, down_t)


def dense_answer(x, weights, mask, topk_weights, topk_ids) -> torch.Tensor:
    """Every expert for every token in float64, pruned atoms zeroed, then weighted."""
    gate, up, down_t = (weight.double() for weight in weights)
    h = functional.silu(torch.einsum("th,eih->tei", x.double(), gate))
    h = h * torch.einsum("th,eih->tei", x.double(), up) * mask
    y = torch.einsum("tei,eih->teh", h, down_t)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for slot in range(topk_ids.shape[1]):
        for token in range(x.shape[0]):
            expert = int(topk_ids[token, slot])
            if 0 <= expert < gate.shape[0]:
                out[token] += topk_weights[token, slot].double() * y[token, expert]
    return out


def run(packed, x, topk_weights, topk_ids) -> torch.Tensor:
    return fused_experts(
        x, packed.gate, packed.up, packed.down_t, packed.runs_ER2, topk_weights, topk_ids
    )


def ragged() -> torch.Tensor:
    mask = torch.zeros(len(WIDTHS), FULL, dtype=torch.bool)
    for expert, width in enumerate(WIDTHS):
        mask[
            expert, torch.randperm(FULL, generator=torch.Generator().manual_seed(expert))[:width]
        ] = 1
    return mask


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_any_width(tokens, dtype, tolerance):
    mask = ragged()
    packed, weights = make_experts({"a": mask}, dtype)
    packed.activate("a")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, H, generator=generator).to(dtype)
    # Ids repeat, and -1 and foreign experts are skipped.
    topk_ids = torch.randint(-1, len(WIDTHS) + 1, (tokens, 12), generator=generator).int()
    topk_weights = torch.rand(tokens, 12, generator=generator)
    found = run(packed, x, topk_weights, topk_ids).double()
    wanted = dense_answer(x, weights, mask, topk_weights, topk_ids)
    assert found.shape == x.shape
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_several_runs_per_expert_and_switching():
    generator = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(4, FULL, generator=generator) < 0.5 for name in "abc"}
    packed, weights = make_experts(masks, torch.float32)
    assert packed.runs_ER2.shape[1] > 1, "three profiles that are not nested need several runs"
    x = torch.randn(5, H, generator=generator)
    topk_ids = torch.randint(0, 4, (5, 2), generator=generator).int()
    topk_weights = torch.rand(5, 2, generator=generator)
    for name, mask in masks.items():
        packed.activate(name)
        found = run(packed, x, topk_weights, topk_ids).double()
        wanted = dense_answer(x, weights, mask, topk_weights, topk_ids)
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_all_experts_pruned_give_zero():
    packed, _ = make_experts({"none": torch.zeros(3, FULL).bool()}, torch.float32)
    packed.activate("none")
    assert packed.gate.shape == (0, H)
    found = run(packed, torch.randn(4, H), torch.rand(4, 2), torch.zeros(4, 2).int())
    assert torch.equal(found, torch.zeros(4, H))


def test_non_contiguous_activations():
    packed, _ = make_experts({"a": ragged()}, torch.float32)
    packed.activate("a")
    wide = torch.randn(6, 2 * H)
    ids, topk_weights = torch.arange(6).reshape(6, 1).int(), torch.ones(6, 1)
    found = run(packed, wide[:, ::2], topk_weights, ids)
    assert torch.equal(found, run(packed, wide[:, ::2].contiguous(), topk_weights, ids))


def test_op_is_opaque_and_has_a_faithful_fake():
    packed, _ = make_experts({"a": ragged()}, torch.float32)
    packed.activate("a")
    arguments = (
        torch.randn(3, H),
        packed.gate.detach(),
        packed.up.detach(),
        packed.down_t.detach(),
        packed.runs_ER2,
        torch.rand(3, 2),
        torch.tensor([[1, 2], [3, 4], [8, 0]], dtype=torch.int32),
    )
    torch.library.opcheck(torch.ops.atomic_moe.fused_experts.default, arguments)
