"""A forced instruction set holds for both contestants of the layer benchmark."""

from __future__ import annotations

import os

import torch

# By `ATOMIC_MOE_CPU_ISA`: what torch is asked for and must deny.
WIDER = {
    "avx512_bf16": ("_is_amx_tile_supported",),
    "avx512": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    "avx2": ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"),
}


def hide_wider_instructions() -> None:
    """Let vLLM take its own kernels for $ATOMIC_MOE_CPU_ISA too, as on a machine with no more.

    Before vLLM is imported: it asks torch then, and loads the library of what it hears.
    """
    for name in WIDER.get(os.environ.get("ATOMIC_MOE_CPU_ISA", ""), ()):
        setattr(torch.cpu, name, lambda: False)
