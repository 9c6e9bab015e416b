"""The Triton backend, always in two kernels: the same bits from call to call. Used by name only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_atomic_moe.experts.backends.triton import STORAGE, launch, unavailable

__all__ = ["STORAGE", "fused_experts", "unavailable"]


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
    """Arguments and result as those of the op; weights as for `triton`."""
    return launch(
        x_TH, weights, scales, biases, bits_SW, words_E1, offsets_E1, topk_weights_TK, topk_ids_TK,
        widest, activation, rows, None, one_kernel=False,
    )  # fmt: skip
