"""CAMERA: the output energy of an atom.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import UNSEEN, Method


def score_camera(sums: LayerSums, layer: int) -> LayerScores:
    """mean(h_k²) · ‖w_k‖², the mean over the routed tokens of all domains.

    An expert without tokens scores zero here; `score_layers` protects it.

    Args:
        sums: `count` [D, E], `h2` [D, E, I], `down_norm` [E, I].
        layer: not used; all layers are scored in the same way.
    """
    rows_E1 = sums.count.sum(dim=0).clamp_min(1).unsqueeze(1)
    return LayerScores((sums.h2.sum(dim=0) / rows_E1 * sums.down_norm.square()).float())


METHOD = Method(score_camera, "atoms, by the energy of their output", options=UNSEEN)
