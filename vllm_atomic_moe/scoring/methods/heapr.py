"""HEAPr (arXiv 2509.22299): the second-order loss increase of removing one atom.

The paper's score of atom k of an expert is ½ · mean(h_k²) · w_kᵀ Ḡ w_k with Ḡ = mean(g gᵀ),
g = ∂ℓ/∂(expert output) and w_k the atom's column of down_proj: an H×H matrix per expert. Since
w_kᵀ g = ∂ℓ/∂h_k, the second factor is mean((∂ℓ/∂h_k)²), and two sums per atom suffice.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import UNSEEN, Method, Option


def score_heapr(sums: LayerSums, layer: int, weight_by_frequency: bool) -> LayerScores:
    """½ · mean(h²) · mean((∂ℓ/∂h)²), means over the routed tokens of all domains.

    An expert without tokens scores zero here; `score_layers` protects it.

    Args:
        sums: `count` [D, E], `h2` [D, E, I], `g2` [D, E, I].
        layer: not used; all layers are scored in the same way.
        weight_by_frequency: multiply by the fraction of routed rows that the expert gets, so that
            the score is the loss increase over all tokens, not over those routed to it.
    """
    assert sums.g2 is not None, "METHOD.needs says so"
    count_E1 = sums.count.sum(dim=0).unsqueeze(1)
    h2_EI, g2_EI = sums.h2.sum(dim=0), sums.g2.sum(dim=0)
    rows_E1 = count_E1.clamp_min(1)
    score_EI = 0.5 * (h2_EI / rows_E1) * (g2_EI / rows_E1)
    if weight_by_frequency:
        score_EI = score_EI * (count_E1 / count_E1.sum())
    return LayerScores(score_EI.float())


METHOD = Method(
    score_heapr,
    "atoms, by the loss increase of removing one",
    options={
        "weight_by_frequency": Option(False, "Weight scores by how often the expert is routed to."),
        **UNSEEN,
    },
    needs=("g2",),
)
