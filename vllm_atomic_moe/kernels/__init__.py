"""Fused experts over packed rows: one opaque custom op, `torch.ops.atomic_moe.fused_experts`.

The op is what the serving layer calls and what compilers see; it has a fake implementation, so that
graphs trace through it without looking inside. Importable without vLLM.

Legend: T tokens, K experts per token, E experts, H hidden size, P packed rows, R runs per expert.
"""

import torch

from vllm_atomic_moe.kernels.reference import fused_experts_reference


@torch.library.custom_op("atomic_moe::fused_experts", mutates_args=())
def fused_experts(
    x_TH: torch.Tensor,
    gate_PH: torch.Tensor,
    up_PH: torch.Tensor,
    down_t_PH: torch.Tensor,
    runs_ER2: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
) -> torch.Tensor:
    """Sum over a token's experts of weight · down(SiLU(gate x) ⊙ (up x)), experts of any width.

    Args:
        x_TH: activations, [T, H].
        gate_PH, up_PH, down_t_PH: packed rows, [P, H], of x's dtype.
        runs_ER2: int32 [E, R, 2], (first row, number of rows) of the rows each expert uses.
        topk_weights_TK: router weights, [T, K], any float dtype.
        topk_ids_TK: expert ids, integer [T, K]; a negative id, or one beyond E, is skipped.

    Returns:
        [T, H] in x's dtype, accumulated in float32. Experts without rows contribute zero.
    """
    return fused_experts_reference(
        x_TH, gate_PH, up_PH, down_t_PH, runs_ER2, topk_weights_TK, topk_ids_TK
    )


@fused_experts.register_fake
def _(x_TH, gate_PH, up_PH, down_t_PH, runs_ER2, topk_weights_TK, topk_ids_TK):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TH, memory_format=torch.contiguous_format)
