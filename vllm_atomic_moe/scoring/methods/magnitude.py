"""Magnitude: the size of an atom's weights, no data.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import Method


def score_magnitude(sums: LayerSums, layer: int) -> LayerScores:
    """‖gate row‖ · ‖up row‖ · ‖down column‖.

    Args:
        sums: `gate_norm`, `up_norm`, `down_norm` [E, I].
        layer: not used; all layers are scored in the same way.
    """
    return LayerScores((sums.gate_norm * sums.up_norm * sums.down_norm).float())


METHOD = Method(score_magnitude, "atoms, by the size of their weights")
