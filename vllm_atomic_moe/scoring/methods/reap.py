"""REAP: whole experts, by the weighted norm of their output.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import EXPERT_SELECTION, Method
from vllm_atomic_moe.scoring.whole import prune_experts


def score_reap(sums: LayerSums, layer: int) -> LayerScores:
    """mean_t p_t‖y_t‖ over the tokens routed to the expert; zero for one without tokens.

    Args:
        sums: `count` [D, E], `output_norm` [D, E], `h2` for its shape.
        layer: not used; all layers are scored in the same way.
    """
    rows_E = sums.count.sum(dim=0).clamp_min(1)
    return LayerScores.whole(sums.output_norm.sum(dim=0) / rows_E, sums.h2.shape[2])


METHOD = Method(
    score_reap,
    "whole experts, by the weighted norm of their output",
    prune_experts,
    selection=EXPERT_SELECTION,
    whole_experts=True,
)
