"""Frequency: whole experts, by the number of tokens that chose them.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import EXPERT_SELECTION, Method
from vllm_atomic_moe.scoring.whole import prune_experts


def score_frequency(sums: LayerSums, layer: int) -> LayerScores:
    """The expert's share of the layer's routed rows.

    Args:
        sums: `count` [D, E], `h2` [D, E, I] for its shape.
        layer: not used; all layers are scored in the same way.
    """
    rows_E = sums.count.sum(dim=0)
    return LayerScores.whole(rows_E / rows_E.sum().clamp_min(1), sums.h2.shape[2])


METHOD = Method(
    score_frequency,
    "whole experts, by how many tokens chose them",
    prune_experts,
    selection=EXPERT_SELECTION,
    whole_experts=True,
)
