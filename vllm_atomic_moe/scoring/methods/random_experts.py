"""Random scores of whole experts: the baseline of the methods that remove them.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import EXPERT_SELECTION, Method
from vllm_atomic_moe.scoring.methods.random import METHOD as OF_ATOMS
from vllm_atomic_moe.scoring.methods.random import generator_of
from vllm_atomic_moe.scoring.whole import prune_experts


def score_random_experts(sums: LayerSums, layer: int, seed: int) -> LayerScores:
    """Uniform scores in [0, 1) that depend on seed and layer only.

    Args:
        sums: only the shape of `h2` [D, E, I] is used.
        layer: layer index.
        seed: any integer.
    """
    experts, size = sums.h2.shape[1:]
    return LayerScores.whole(torch.rand(experts, generator=generator_of(seed, layer)), size)


METHOD = Method(
    score_random_experts,
    "whole experts, at random",
    prune_experts,
    OF_ATOMS.options,
    EXPERT_SELECTION,
    whole_experts=True,
)
