"""The slow oracle: one expert after another in plain PyTorch, on any device and dtype.

Faster backends are compared with this one; keep it obvious.

Legend: T tokens, K experts per token, N = T·K routed rows, E experts, H hidden size, P packed rows,
R runs per expert, F_e width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from vllm_atomic_moe.experts.packing import RowStorage

STORAGE = RowStorage()


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Never."""
    return None


def fused_experts(
    x_TH: torch.Tensor,
    weights: Sequence[torch.Tensor],
    runs_ER2: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    widest: int,
) -> torch.Tensor:
    """Arguments and result as in `kernels.fused_experts`; weights are gate, up, down_t [P, H]."""
    gate_PH, up_PH, down_t_PH = weights
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for expert, runs in enumerate(runs_ER2.tolist()):
        tokens_n, slots_n = torch.where(topk_ids_TK == expert)
        if not len(tokens_n):
            continue
        x_nH = x_TH[tokens_n]
        weights_n1 = topk_weights_TK[tokens_n, slots_n, None].float()
        for first, length in runs:
            if length:
                rows = slice(first, first + length)
                gate_nF = functional.linear(x_nH, gate_PH[rows]).float()
                up_nF = functional.linear(x_nH, up_PH[rows]).float()
                h_nF = (functional.silu(gate_nF) * up_nF).to(x_TH.dtype)
                out_TH.index_add_(0, tokens_n, (h_nF @ down_t_PH[rows]).float() * weights_n1)
    return out_TH.to(x_TH.dtype)
