"""Remove whole experts with the lowest scores, and keep what every layer's router needs.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_atomic_moe.scoring.masks import LayerScores, Masks
from vllm_atomic_moe.scoring.router import RouterNeeds

WHOLE_SCOPES = ("global", "layer", "group")


def prune_experts(
    scores: Mapping[int, LayerScores], ratio: float, router: RouterNeeds, scope: str = "global"
) -> Masks:
    """Remove the experts with the lowest scores.

    Of equal scores the lower layer is removed first, then the lower expert.

    Args:
        scores: layer index -> scores, layers ascending; not modified.
        ratio: fraction of experts to remove: round(ratio · experts), counted by `scope`.
        router: what must stay.
        scope: "global", all layers compete; "layer", every layer loses the same; "group", every
            group of a router does (a router without groups is one).

    Raises:
        ValueError: another scope, or too few experts may be removed.
    """
    if scope not in WHOLE_SCOPES:
        raise ValueError(f"scope {scope!r}: experts go whole; wanted {', '.join(WHOLE_SCOPES)}")
    score_LE = torch.stack([of_layer.atoms[:, 0] for of_layer in scores.values()])
    size = next(iter(scores.values())).atoms.shape[1]
    # Of equal scores the lower expert is removed first, so the best are last in ascending order.
    fixed_LE = torch.stack(
        [router.must_stay(score_E.argsort(stable=True).flip(0)) for score_E in score_LE]
    )
    parts = 1 if scope == "global" else len(scores)
    if scope == "group" and router.groups is not None:
        parts *= router.groups.number
    stays = [
        _lowest_removed(score, fixed, ratio, router)
        for score, fixed in zip(
            score_LE.flatten().chunk(parts), fixed_LE.flatten().chunk(parts), strict=True
        )
    ]
    stays_LE = torch.cat(stays).view_as(score_LE)
    return Masks.whole(dict(zip(scores, stays_LE, strict=True)), size)


def _lowest_removed(
    score: torch.Tensor, fixed: torch.Tensor, ratio: float, router: RouterNeeds
) -> torch.Tensor:
    """Mask without the round(ratio · n) lowest scores; `fixed` ones must stay."""
    total, removable = score.numel(), int((~fixed).sum())
    count = round(ratio * total)
    if count > removable:
        raise ValueError(
            f"ratio {ratio} removes {count} of {total} experts, and {total - removable} must stay "
            f"for the router's choice of {router.experts_per_token} a token; use at most "
            f"{removable / total:.4g}"
        )
    keep = torch.ones(total, dtype=torch.bool)
    keep[score.masked_fill(fixed, torch.inf).argsort(stable=True)[:count]] = False
    return keep
