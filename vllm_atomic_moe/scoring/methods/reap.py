"""REAP: whole experts, by the weighted norm of what they put out.

Legend: D domains, E experts, I full intermediate size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores, Masks
from vllm_atomic_moe.scoring.method import Method, Option
from vllm_atomic_moe.scoring.router import RouterNeeds


def score_reap(sums: LayerSums, layer: int) -> LayerScores:
    """mean_t p_t‖y_t‖ over the tokens routed to the expert; zero for one without tokens.

    Args:
        sums: `count` [D, E], `output_norm` [D, E], `h2` for its shape.
        layer: not used; all layers are scored alike.
    """
    rows_E = sums.count.sum(dim=0).clamp_min(1)
    return LayerScores.whole(sums.output_norm.sum(dim=0) / rows_E, sums.h2.shape[2])


def prune_reap(
    scores: Mapping[int, LayerScores], ratio: float, router: RouterNeeds, scope: str = "global"
) -> Masks:
    """Remove the experts with the lowest scores; every layer keeps what its router needs.

    Of equal scores the one in the lower layer, then the lower expert goes first.

    Args:
        scores: layer index -> scores, layers ascending; not modified.
        ratio: fraction of experts to remove; round(ratio · experts) go, counted by `scope`.
        router: what must stay.
        scope: "global", all layers compete; or "layer", every layer loses the same.

    Raises:
        ValueError: another scope, or more experts would have to go than may.
    """
    experts = {layer: of_layer.atoms[:, 0] for layer, of_layer in scores.items()}
    size = next(iter(scores.values())).atoms.shape[1]
    if scope == "global":
        return Masks.whole(_remove(experts, ratio, router), size)
    if scope == "layer":
        routable: dict[int, torch.Tensor] = {}
        for layer, score_E in experts.items():
            routable |= _remove({layer: score_E}, ratio, router)
        return Masks.whole(routable, size)
    raise ValueError(f"scope {scope!r}: experts go whole; wanted global or layer")


def _remove(
    experts: Mapping[int, torch.Tensor], ratio: float, router: RouterNeeds
) -> dict[int, torch.Tensor]:
    """Routable experts, bool [E] per layer."""
    counts = [score.numel() for score in experts.values()]
    # Of equal scores the lower expert goes first, so the best are the last of the ascending order.
    fixed = torch.cat(
        [router.must_stay(score.argsort(stable=True).flip(0)) for score in experts.values()]
    )
    count, removable = round(ratio * sum(counts)), int((~fixed).sum())
    if count > removable:
        raise ValueError(
            f"ratio {ratio} removes {count} of {sum(counts)} experts, and "
            f"{int(fixed.sum())} must stay for the router's choice of "
            f"{router.experts_per_token} a token; use at most {removable / sum(counts):.4g}"
        )
    keep = torch.ones(sum(counts), dtype=torch.bool)
    flat = torch.cat(list(experts.values())).masked_fill(fixed, torch.inf)
    keep[flat.argsort(stable=True)[:count]] = False
    return dict(zip(experts, keep.split(counts), strict=True))


METHOD = Method(
    score_reap,
    "whole experts, by the weighted norm of what they put out",
    prune_reap,
    selection={
        "scope": Option("global", "global: all layers compete; layer: each loses as many experts.")
    },
    whole_experts=True,
)
