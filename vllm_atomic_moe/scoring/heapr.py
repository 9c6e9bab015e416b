"""HEAPr (arXiv 2509.22299): the second-order loss increase of removing one atom.

The paper's score of atom k of an expert is ½ · mean(h_k²) · w_kᵀ Ḡ w_k with Ḡ = mean(g gᵀ),
g = ∂ℓ/∂(expert output) and w_k the atom's column of down_proj: an H×H matrix per expert. Since
w_kᵀ g = ∂ℓ/∂h_k, the second factor is mean((∂ℓ/∂h_k)²), and two sums per atom are enough.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def score_heapr(sums: Mapping[str, torch.Tensor], layer: int) -> torch.Tensor:
    """½ · mean(h²) · mean((∂ℓ/∂h)²), means over the routed tokens of all domains.

    An expert that saw no token scores +inf: nothing is known against it, so it is kept whole (a
    score of zero would remove it first). Calibration warns about such experts.

    Args:
        sums: `count` [D, E], `h2` [D, E, I], `g2` [D, E, I], float64.
        layer: not used; all layers are scored alike.

    Returns:
        float32 [E, I].
    """
    count_E1 = sums["count"].sum(dim=0).unsqueeze(1)
    h2_EI, g2_EI = sums["h2"].sum(dim=0), sums["g2"].sum(dim=0)
    score_EI = 0.5 * (h2_EI / count_E1) * (g2_EI / count_E1)
    return score_EI.masked_fill(count_E1 == 0, torch.inf).float()
