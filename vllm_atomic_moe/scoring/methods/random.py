"""Random scores of atoms: the baseline that every method must beat.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import hashlib

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import Method, Option


def score_random(sums: LayerSums, layer: int, seed: int) -> LayerScores:
    """Uniform scores in [0, 1) that depend on seed and layer only.

    Args:
        sums: only the shape of `h2` [D, E, I] is used.
        layer: layer index.
        seed: any integer.
    """
    return LayerScores(torch.rand(sums.h2.shape[1:], generator=generator_of(seed, layer)))


def generator_of(seed: int, layer: int) -> torch.Generator:
    """A generator that depends on seed and layer only."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


METHOD = Method(score_random, "atoms, at random", options={"seed": Option(0, "Seed.")})
