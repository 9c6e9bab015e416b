"""Budget: how many atoms are removed, and which.

Of equal scores, the lower layer is removed first, then the lower expert, then the lower atom. So
masks are the same on every machine, and nested in the ratio (at alignment 1).

Legend: L layers, E experts, I full intermediate size, F_e kept width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_atomic_moe.scoring.masks import LayerScores, Masks

SCOPES = ("global", "layer", "expert")


def prune_atoms(
    scores: Mapping[int, LayerScores],
    ratio: float,
    scope: str = "global",
    align: int = 1,
    min_width: int = 0,
) -> Masks:
    """Remove the atoms with the lowest scores; an expert without atoms stays routable.

    Args:
        scores: layer index -> scores, layers ascending; not modified.
        ratio: fraction of atoms to remove: round(ratio · atoms), counted by `scope`.
        scope: "global", all layers compete; "layer", every layer loses the same; "expert", every
            expert does.
        align: every width becomes a multiple of it (see `align_widths`); by "expert" the same one,
            the nearest.
        min_width: atoms that every expert keeps, rounded up to a multiple of `align`.

    Raises:
        ValueError: an option is out of range, or too few atoms may be removed.
    """
    atoms = {layer: of_layer.atoms for layer, of_layer in scores.items()}
    size = next(iter(atoms.values())).shape[1]
    check_align(align, size)
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: wanted one of {', '.join(SCOPES)}")
    least = -(-min_width // align) * align
    if not 0 <= least <= size:
        raise ValueError(
            f"minimal width {min_width} (rounded up to {least} by --align {align}): wanted 0 to "
            f"the intermediate size {size}"
        )
    fixed = {layer: score.isposinf() | _top(score, least) for layer, score in atoms.items()}
    if scope == "global":
        keep = _remove(atoms, fixed, ratio)
    else:
        keep = {
            layer: _remove_each(layer, score, fixed[layer], ratio, whole=scope == "layer")
            for layer, score in atoms.items()
        }
    if scope == "expert" and align > 1:
        width = max(_nearest(size - round(ratio * size), align), least)
        return Masks({layer: _top(score, width) for layer, score in atoms.items()})
    return Masks(align_masks(atoms, keep, align))


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that is not a fraction.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(
            f"ratio {ratio}: wanted the fraction to remove, 0 <= ratio < 1 (25 percent is 0.25)"
        )


def check_align(align: int, size: int) -> None:
    """Refuse an alignment that does not fit full experts.

    Raises:
        ValueError: it does not divide the intermediate size.
    """
    if align < 1 or size % align:
        raise ValueError(
            f"alignment {align}: wanted a divisor of the intermediate size {size}, so that whole "
            "experts are aligned too"
        )


def align_masks(
    atoms: Mapping[int, torch.Tensor], keep: Mapping[int, torch.Tensor], align: int
) -> dict[int, torch.Tensor]:
    """Round every width to a multiple of `align`, changing the fewest, least important atoms.

    The total of kept atoms changes by at most half a unit, and that of each layer by at most one:
    each layer carries its rounding error to the next.

    Args:
        atoms: layer index -> scores [E, I]; not modified.
        keep: layer index -> bool [E, I] that keep the highest scores of every expert.
        align: a divisor of I.
    """
    if align == 1:
        return dict(keep)
    aligned: dict[int, torch.Tensor] = {}
    carry = 0
    for layer, mask in keep.items():
        widths_E = align_widths(mask.sum(dim=1), atoms[layer], align, carry)
        carry += int(mask.sum() - widths_E.sum())
        aligned[layer] = top_atoms(atoms[layer], widths_E)
    return aligned


def align_widths(
    widths_E: torch.Tensor, score_EI: torch.Tensor, align: int, carry: int = 0
) -> torch.Tensor:
    """Neighboring multiples of `align` with the sum nearest to that of the widths plus `carry`.

    With r the width's remainder, rounding up changes align − r atoms and rounding down r. So the
    largest remainders are rounded up, which changes the fewest. Of equal remainders, those with the
    highest scores between the two multiples are rounded up.

    Returns:
        int64 [E].
    """
    rest_E = widths_E % align
    down_E = widths_E - rest_E
    rank_EI = _rank(score_EI)
    size = score_EI.shape[1]
    # Ascending rank: the last F atoms stay, so the block between two multiples is this.
    block_EI = (rank_EI >= size - down_E[:, None] - align) & (rank_EI < size - down_E[:, None])
    value_E = torch.where(block_EI, score_EI.double(), 0).sum(dim=1)
    by_value = value_E.argsort(descending=True, stable=True)
    order = by_value[rest_E[by_value].argsort(descending=True, stable=True)]
    ups = (2 * (int(rest_E.sum()) + carry) + align) // (2 * align)
    ups = min(max(ups, 0), int((rest_E > 0).sum()))
    aligned_E = down_E.clone()
    aligned_E[order[:ups]] += align
    return aligned_E


def top_atoms(score_EI: torch.Tensor, widths_E: torch.Tensor) -> torch.Tensor:
    """Mask of the highest scores of every expert: bool [E, I] with the given widths."""
    return _rank(score_EI) >= score_EI.shape[1] - widths_E[:, None]


def _nearest(width: int, align: int) -> int:
    """The multiple nearest to a width, the upper of two; not 0, which would prune whole experts."""
    return max((2 * width + align) // (2 * align), min(width, 1)) * align


def _top(score_EI: torch.Tensor, width: int) -> torch.Tensor:
    return top_atoms(score_EI, torch.full((score_EI.shape[0],), width))


def _rank(score_EI: torch.Tensor) -> torch.Tensor:
    """Rank of every atom in its expert, lowest score first: int64 [E, I]."""
    return score_EI.argsort(dim=1, stable=True).argsort(dim=1)


def _remove(
    atoms: Mapping[int, torch.Tensor], fixed: Mapping[int, torch.Tensor], ratio: float
) -> dict[int, torch.Tensor]:
    flat = torch.cat([score.flatten() for score in atoms.values()])
    flat_fixed = torch.cat([mask.flatten() for mask in fixed.values()])
    kept = _lowest_removed(flat, flat_fixed, ratio, "all layers")
    pieces = kept.split([score.numel() for score in atoms.values()])
    return {
        layer: piece.view(score.shape)
        for (layer, score), piece in zip(atoms.items(), pieces, strict=True)
    }


def _remove_each(
    layer: int, score_EI: torch.Tensor, fixed_EI: torch.Tensor, ratio: float, whole: bool
) -> torch.Tensor:
    if whole:
        kept = _lowest_removed(score_EI.flatten(), fixed_EI.flatten(), ratio, f"layer {layer}")
        return kept.view(score_EI.shape)
    rows = [
        _lowest_removed(score, fixed, ratio, f"layer {layer} expert {expert}")
        for expert, (score, fixed) in enumerate(zip(score_EI, fixed_EI, strict=True))
    ]
    return torch.stack(rows)


def _lowest_removed(
    score: torch.Tensor, fixed: torch.Tensor, ratio: float, where: str
) -> torch.Tensor:
    """Mask without the round(ratio · n) lowest scores; `fixed` ones must stay."""
    count, removable = round(ratio * score.numel()), int((~fixed).sum())
    if count > removable:
        raise ValueError(
            f"ratio {ratio} removes {count} of the {score.numel()} atoms of {where}, and only "
            f"{removable} may go: the others are of experts that saw too few tokens, or held by "
            "--min-width; use a lower ratio, another scope, more calibration text or --allow-unseen"
        )
    keep = torch.ones(score.numel(), dtype=torch.bool)
    keep[score.masked_fill(fixed, torch.inf).argsort(stable=True)[:count]] = False
    return keep
