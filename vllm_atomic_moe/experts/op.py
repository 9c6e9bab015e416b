"""Fused experts over packed rows: one opaque custom op, `torch.ops.atomic_moe.fused_experts`.

The engine's layer calls this op, and compilers see nothing below it. Its fake implementation lets
graphs trace through it. The backend that computes it is chosen once, at load.

Legend: T tokens, K experts per token, E experts, H hidden size, S slots, W words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_atomic_moe.experts.backends import backend_module


def _fused_experts(
    x_TH: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bits_SW: torch.Tensor,
    words_E1: torch.Tensor,
    offsets_E1: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    widest: int,
    activation: str,
    rows: str,
    backend: str,
) -> torch.Tensor:
    """Sum over a token's experts of weight · (down(act(gate x, up x)) + bias), of any width.

    Args:
        x_TH: activations, [T, H].
        weights: packed rows of x's dtype, or codes, as the backend's storage keeps them
            (`PackedExperts.weights`). Finite: an infinite atom of down_proj may reach the tokens
            of a slot that does not use it, as 0 · ∞.
        scales: of codes, as `PackedExperts.scales`; empty for plain rows.
        biases: float32, of gate and up by atom, of down by expert (`PackedExperts.biases`); or
            none.
        bits_SW: int32 [16, W], the packed rows that every slot uses (`PackedExperts`).
        words_E1: int64 [E+1], start of every expert's words.
        offsets_E1: int64 [E+1], start of every expert's packed rows.
        topk_weights_TK: router weights, [T, K], any float dtype.
        topk_ids_TK: expert ids that carry slots (`packing.with_slots`), int32 or int64 [T, K]; a
            negative id, or one beyond E, is skipped.
        widest: packed rows of the widest expert.
        activation: `Activation.spec`.
        rows: `RowFormat.spec`.
        backend: name of the chosen `Backend`.

    Returns:
        [T, H] in x's dtype, accumulated in float32. Experts without atoms contribute down's bias.
    """
    return backend_module(backend).fused_experts(
        x_TH,
        weights,
        scales,
        biases,
        bits_SW,
        words_E1,
        offsets_E1,
        topk_weights_TK,
        topk_ids_TK,
        widest,
        activation,
        rows,
    )


# Not `torch.library.custom_op`: its wrappers take longer than a small layer's routing.
torch.library.define(
    "atomic_moe::fused_experts", torch.library.infer_schema(_fused_experts, mutates_args=())
)
torch.library.impl("atomic_moe::fused_experts", "CompositeExplicitAutograd", _fused_experts)


@torch.library.register_fake("atomic_moe::fused_experts")
def _(x_TH, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TH, memory_format=torch.contiguous_format)


fused_experts = torch.ops.atomic_moe.fused_experts.default
