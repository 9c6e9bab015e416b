"""REAP: whole experts, by the weighted norm of what they put out.

Legend: D domains, E experts, I full intermediate size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores, Masks


def score_reap(sums: LayerSums, layer: int) -> LayerScores:
    """mean_t p_t‖y_t‖ over the tokens routed to the expert; zero for one without tokens.

    Args:
        sums: `count` [D, E], `output_norm` [D, E], `h2` for its shape.
        layer: not used; all layers are scored alike.
    """
    rows_E = sums.count.sum(dim=0).clamp_min(1)
    return LayerScores.whole(sums.output_norm.sum(dim=0) / rows_E, sums.h2.shape[2])


def prune_reap(
    scores: Mapping[int, LayerScores], ratio: float, experts_per_token: int, scope: str = "global"
) -> Masks:
    """Remove the experts with the lowest scores; every layer keeps at least K.

    Of equal scores the one in the lower layer, then the lower expert goes first.

    Args:
        scores: layer index -> scores, layers ascending; not modified.
        ratio: fraction of experts to remove; round(ratio · experts) go, counted by `scope`.
        experts_per_token: K.
        scope: "global", all layers compete; or "layer", every layer loses the same.

    Raises:
        ValueError: another scope, or more experts would have to go than may.
    """
    experts = {layer: of_layer.atoms[:, 0] for layer, of_layer in scores.items()}
    size = next(iter(scores.values())).atoms.shape[1]
    if scope == "global":
        return Masks.whole(_remove(experts, ratio, experts_per_token), size)
    if scope == "layer":
        routable: dict[int, torch.Tensor] = {}
        for layer, score_E in experts.items():
            routable |= _remove({layer: score_E}, ratio, experts_per_token)
        return Masks.whole(routable, size)
    raise ValueError(f"scope {scope!r}: experts go whole; wanted global or layer")


def _remove(
    experts: Mapping[int, torch.Tensor], ratio: float, at_least: int
) -> dict[int, torch.Tensor]:
    """Routable experts, bool [E] per layer."""
    order = torch.cat([score.argsort(stable=True).argsort() for score in experts.values()])
    counts = [score.numel() for score in experts.values()]
    # The `at_least` best of every layer stay: rank from the top, within the layer.
    from_top = torch.repeat_interleave(torch.tensor(counts), torch.tensor(counts)) - order
    fixed = from_top <= at_least
    count = round(ratio * sum(counts))
    if count > int((~fixed).sum()):
        raise ValueError(
            f"ratio {ratio} removes {count} of {sum(counts)} experts, and {at_least} of every "
            f"layer must stay because a token uses so many; use at most "
            f"{int((~fixed).sum()) / sum(counts):.4g}"
        )
    keep = torch.ones(sum(counts), dtype=torch.bool)
    flat = torch.cat(list(experts.values())).masked_fill(fixed, torch.inf)
    keep[flat.argsort(stable=True)[:count]] = False
    return dict(zip(experts, keep.split(counts), strict=True))
