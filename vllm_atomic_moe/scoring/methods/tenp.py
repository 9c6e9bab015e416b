"""TENP (arXiv 2606.09885): important experts stay whole, the others are narrowed.

Stage one ranks the experts of a layer, stage two the atoms of an expert. A fraction α of all
experts stays whole, more of them in deeper layers; every other expert keeps the fraction
β = (ρ − α)/(1 − α) of its atoms, ρ = 1 − ratio, so that ρ of all atoms stay.

Legend: D domains, E experts, I full intermediate size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.budget import align_masks, check_align, top_atoms
from vllm_atomic_moe.scoring.masks import LayerScores, Masks
from vllm_atomic_moe.scoring.method import ALIGN, UNSEEN, Method, Option


def score_tenp(sums: LayerSums, layer: int) -> LayerScores:
    """Expert: Σ_t p_t‖y_t‖(1 − cos(x_t, y_t)), L2-normalized per domain and summed over domains.
    Atom: mean_t h_tk⟨w_k, y_t⟩/‖y_t‖ over the routed tokens of all domains, signed.

    An expert without tokens scores zero here; `score_layers` protects it.

    Args:
        sums: `count` [D, E], `output_change` [D, E], `contribution` [D, E, I].
        layer: not used; all layers are scored in the same way.
    """
    change_DE = sums.output_change
    lengths_D1 = change_DE.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rows_E1 = sums.count.sum(dim=0).clamp_min(1).unsqueeze(1)
    atoms_EI = sums.contribution.sum(dim=0) / rows_E1
    return LayerScores(atoms_EI.float(), (change_DE / lengths_D1).sum(dim=0).float())


def prune_tenp(
    scores: Mapping[int, LayerScores],
    ratio: float,
    alpha: float | None = None,
    trapezoid: str = "1:2",
    align: int = 1,
) -> Masks:
    """Keep the most important experts whole and narrow the others equally.

    Exactly round(ratio · atoms) atoms are removed. If the narrow width is not a whole number, the
    experts that rank higher in their layer keep one more atom. Of equal scores the lower index is
    removed first.

    Args:
        scores: layer index -> scores with `experts`, layers ascending; not modified.
        ratio: fraction of atoms to remove.
        alpha: fraction of all experts that stay whole, 0 <= α <= ρ; None means ρ/2.
        trapezoid: FIRST:LAST, the proportion of whole experts in the first and the last layer,
            linear in between.
        align: every width becomes a multiple of it.

    Raises:
        ValueError: an option is out of range, or a layer has more experts with too few tokens
            (which must stay whole) than whole ones.
    """
    keep_fraction = 1 - ratio
    alpha = keep_fraction / 2 if alpha is None else alpha
    if not 0 <= alpha <= keep_fraction:
        raise ValueError(
            f"alpha {alpha}: wanted the fraction of experts that stay whole, 0 to {keep_fraction:g}"
            f" (1 - ratio)"
        )
    experts, size = next(iter(scores.values())).atoms.shape
    check_align(align, size)
    weights = _trapezoid_weights(trapezoid, len(scores))
    total = len(scores) * experts * size
    stay = total - round(ratio * total)
    # At α = ρ rounding could ask for more whole experts than the kept atoms allow.
    whole_experts = min(round(alpha * len(scores) * experts), stay // size)
    whole_L = share_out(whole_experts, weights, experts)
    ranks = {layer: _rank_from_top(layer, of_layer) for layer, of_layer in scores.items()}
    for (layer, of_layer), whole in zip(scores.items(), whole_L, strict=True):
        _check_protected(layer, of_layer, whole, ratio)

    widths = _narrow_widths(list(ranks.values()), whole_L, stay - whole_experts * size, size)
    atoms = {layer: of_layer.atoms for layer, of_layer in scores.items()}
    keep = {
        layer: top_atoms(atoms[layer], widths_E)
        for layer, widths_E in zip(scores, widths, strict=True)
    }
    return Masks(align_masks(atoms, keep, align))


def share_out(total: int, weights: Sequence[float], most: int) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `total`, none above `most`.

    Largest remainder (of equal ones the deeper layer's); what exceeds a full layer is distributed
    among the others in the same way.
    """
    shares = [0] * len(weights)
    while rest := total - sum(shares):
        open_ = [i for i in range(len(weights)) if shares[i] < most]
        scale = rest / sum(weights[i] for i in open_)
        quota = {i: min(weights[i] * scale, most - shares[i]) for i in open_}
        for i in open_:
            shares[i] += int(quota[i])
        left = total - sum(shares)
        by_remainder = sorted(open_, key=lambda i: (quota[i] - int(quota[i]), i), reverse=True)
        for i in by_remainder[:left]:
            shares[i] += shares[i] < most
    return shares


def _trapezoid_weights(trapezoid: str, layers: int) -> list[float]:
    try:
        first, last = (float(side) for side in trapezoid.split(":"))
        sound = 0 < first < torch.inf and 0 < last < torch.inf
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"trapezoid {trapezoid!r}: wanted FIRST:LAST, both above 0, such as 1:2")
    return [first + (last - first) * i / max(1, layers - 1) for i in range(layers)]


def _rank_from_top(layer: int, of_layer: LayerScores) -> torch.Tensor:
    """Rank of every expert in its layer, most important first: int64 [E]."""
    if of_layer.experts is None:
        raise ValueError(
            f"layers.{layer}.expert_score is missing; tenp scores experts too, score again"
        )
    return of_layer.experts.argsort(stable=True).flip(0).argsort()


def _check_protected(layer: int, of_layer: LayerScores, whole: int, ratio: float) -> None:
    protected = int(of_layer.atoms.isposinf().all(dim=1).sum())
    if protected > whole:
        raise ValueError(
            f"layer {layer}: {protected} experts saw too few tokens and must stay whole, ratio "
            f"{ratio} keeps {whole} whole; use a lower ratio, a higher --alpha, more calibration "
            "text or --allow-unseen"
        )


def _narrow_widths(
    ranks: Sequence[torch.Tensor], whole_L: Sequence[int], budget: int, size: int
) -> list[torch.Tensor]:
    """Widths of all experts, int64 [E] per layer; narrowed ones share `budget` atoms equally."""
    ranks_LE = torch.stack(list(ranks))
    whole_LE = ranks_LE < torch.tensor(whole_L)[:, None]
    narrow = (~whole_LE).flatten().nonzero().flatten()
    widths_LE = torch.full_like(ranks_LE, size)
    if len(narrow):
        # Rank first, layer second: an extra atom goes to the best narrowed expert of a layer.
        order = narrow[ranks_LE.flatten()[narrow].argsort(stable=True)]
        base, extra = divmod(budget, len(narrow))
        flat = widths_LE.view(-1)
        flat[order] = base
        flat[order[:extra]] += 1
    return list(widths_LE)


METHOD = Method(
    score_tenp,
    "important experts stay whole, the others are narrowed",
    prune_tenp,
    UNSEEN,
    {
        "alpha": Option(
            None, "Fraction of experts that stay whole.", float, shown="(1 - ratio) / 2"
        ),
        "trapezoid": Option(
            "1:2",
            "Whole experts of the first and the last layer, in proportion.",
            metavar="FIRST:LAST",
        ),
        "align": ALIGN,
    },
)
