"""The slow oracle: one expert after another in plain PyTorch, on any device and dtype.

Faster backends are compared with this one; keep it obvious. It computes in float32, expert by
expert: 16-bit matmuls are very slow on CPUs without instructions for them.

Legend: T tokens, K experts per token, E experts, H hidden size, S slots, W words, P packed rows,
n rows routed to an expert, F the expert's atoms that any of these rows uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_atomic_moe.experts.activation import Activation
from vllm_atomic_moe.experts.formats import stored_values
from vllm_atomic_moe.experts.packing import SLOTS, RowStorage, unpack_bits
from vllm_atomic_moe.files.row_formats import RowFormat

STORAGE = RowStorage()


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Never."""
    return None


def fused_experts(
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
) -> torch.Tensor:
    """Arguments and result as those of the op; weights are gate (if any), up, down_t [P, H].

    Codes are decoded to x's dtype, like the weights of a plain checkpoint.
    """
    act, row_format = Activation.parse(activation), RowFormat.parse(rows)
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    experts_TK, slots_TK = topk_ids_TK // SLOTS, topk_ids_TK % SLOTS  # both rounded down
    offsets, words = offsets_E1.tolist(), words_E1.tolist()
    for expert in range(len(offsets) - 1):
        tokens_n, ks_n = torch.where(experts_TK == expert)
        if not len(tokens_n):
            continue
        first, end = offsets[expert : expert + 2]
        bits_SW_e = bits_SW[:, words[expert] : words[expert + 1]]
        used_nF = unpack_bits(bits_SW_e, end - first)[slots_TK[tokens_n, ks_n].long()]
        atoms_F = used_nF.any(dim=0).nonzero().flatten()
        *inward, down_t_FH = (
            stored_values(weights, scales, which, row_format, expert, first + atoms_F)
            .to(x_TH.dtype)
            .float()
            for which in range(len(weights))
        )
        x_nH = x_TH[tokens_n].float()
        sums = [x_nH @ rows_FH.t() for rows_FH in inward]
        if biases:
            sums = [sum_nF + b[first:end][atoms_F] for sum_nF, b in zip(sums, biases, strict=False)]
        h_nF = act(*sums) if act.gated else act(None, *sums)
        y_nH = torch.where(used_nF[:, atoms_F], h_nF, 0) @ down_t_FH
        if biases:
            y_nH += biases[-1][expert]
        weights_n1 = topk_weights_TK[tokens_n, ks_n, None].float()
        out_TH.index_add_(0, tokens_n, y_nH * weights_n1)
    return out_TH.to(x_TH.dtype)
