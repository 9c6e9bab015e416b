"""A forced instruction set applies to both contestants of the layer benchmark."""

from __future__ import annotations

import os

import torch

# Value of `ATOMIC_MOE_CPU_ISA` -> the features that torch must deny.
WIDER = {
    "avx512_bf16": ("_is_amx_tile_supported",),
    "avx512": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    "avx2": ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"),
}


def hide_wider_instructions() -> None:
    """Make vLLM choose its kernels for $ATOMIC_MOE_CPU_ISA too, as on a machine that has no more.

    Call it before vLLM is imported: vLLM then asks torch, and loads the library that fits.
    """
    for name in WIDER.get(os.environ.get("ATOMIC_MOE_CPU_ISA", ""), ()):
        setattr(torch.cpu, name, lambda: False)
