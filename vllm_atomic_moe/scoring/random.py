"""Random scores of atoms and of experts: the baselines every method has to beat.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import hashlib

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores


def score_random(sums: LayerSums, layer: int, seed: int) -> LayerScores:
    """Uniform scores in [0, 1), the same for the same seed and layer whatever else is scored.

    Args:
        sums: only the shape of `h2` [D, E, I] is used.
        layer: layer index.
        seed: any integer.
    """
    return LayerScores(torch.rand(sums.h2.shape[1:], generator=_generator(seed, layer)))


def score_random_experts(sums: LayerSums, layer: int, seed: int) -> LayerScores:
    """Uniform scores in [0, 1) of whole experts, likewise.

    Args:
        sums: only the shape of `h2` [D, E, I] is used.
        layer: layer index.
        seed: any integer.
    """
    experts, size = sums.h2.shape[1:]
    return LayerScores.whole(torch.rand(experts, generator=_generator(seed, layer)), size)


def _generator(seed: int, layer: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
