"""SHAPE (arXiv 2606.09886): whole experts, by how they cooperate.

A layer is a cooperative game; its coalitions are the top-k sets that tokens chose. v(A) is the
number of times that exactly A was chosen, N(B) the number of chosen sets that contained B. The gain
of expert i in a set A is v(A) − α_i·N(A∖i), where α_i is the least v(A)/N(A∖i) over the sets with
i, and its score φ_i is the sum over these sets.

Legend: E experts, K experts per token, S observed sets, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.masks import LayerScores, Masks
from vllm_atomic_moe.scoring.method import EXPERT_SELECTION, Method
from vllm_atomic_moe.scoring.router import RouterNeeds
from vllm_atomic_moe.scoring.whole import prune_experts


def score_shape(sums: LayerSums, layer: int) -> LayerScores:
    """φ of every expert, as a fraction of the layer's total; zero for one never chosen.

    Args:
        sums: `sets` [S, 1+K] and `set_counts` [S]; `h2` [D, E, I] for its shape.
        layer: not used; all layers are scored in the same way.

    Raises:
        ValueError: K is 1, so that no experts cooperate.
    """
    if sums.sets.shape[1] < 3:
        raise ValueError(
            "the model routes every token to 1 expert; shape scores how experts of one token "
            "cooperate and needs at least 2; use reap"
        )
    sets_SK, v_S = _join_domains(sums.sets[:, 1:].long(), sums.set_counts.double())
    experts, size = sums.h2.shape[1:]
    ratio_SK = v_S[:, None] / (rest_SK := _rest_frequencies(sets_SK, v_S, experts))
    alpha_E = torch.full((experts,), torch.inf, dtype=torch.float64)
    alpha_E.scatter_reduce_(0, sets_SK.flatten(), ratio_SK.flatten(), "amin")
    gain_SK = v_S[:, None] - alpha_E[sets_SK] * rest_SK
    phi_E = torch.zeros(experts, dtype=torch.float64)
    phi_E.index_add_(0, sets_SK.flatten(), gain_SK.flatten())
    phi_E = phi_E.clamp_min(0)  # Gains are negative only by rounding.
    return LayerScores.whole(phi_E / phi_E.sum().clamp_min(torch.finfo(phi_E.dtype).tiny), size)


def prune_shape(
    scores: Mapping[int, LayerScores], ratio: float, router: RouterNeeds, scope: str = "global"
) -> Masks:
    """Keep the shortest prefix of each layer, by φ, that reaches α of the layer's total.

    It also keeps what the router needs.

    All layers share the α at which 1 − `ratio` of all experts stay. An expert joins its layer's
    prefix when α exceeds the sum of those before it; so sorting the experts of all layers by that
    sum finds the α that bisection would. Of equal sums the lower layer's expert stays; of equal
    scores the lower expert.

    Args:
        scores: layer index -> scores, layers ascending; not modified.
        ratio: fraction of experts to remove.
        router: what must stay.
        scope: "global" as above; else as in `prune_experts`, with φ as the score.

    Raises:
        ValueError: another scope, or too few experts may be removed.
    """
    if scope != "global":
        return prune_experts(scores, ratio, router, scope)
    size = next(iter(scores.values())).atoms.shape[1]
    joins, orders = [], []
    for of_layer in scores.values():
        phi_E = of_layer.atoms[:, 0].double()
        order_E = phi_E.argsort(descending=True, stable=True)
        before_E = phi_E[order_E].cumsum(0) - phi_E[order_E]
        # The empty prefix reaches a layer with only zero scores.
        joins_E = before_E / phi_E.sum() if phi_E.sum() > 0 else torch.ones_like(before_E)
        joins_E[router.must_stay(order_E)[order_E]] = -1
        joins.append(joins_E)
        orders.append(order_E)
    joins_LE = torch.stack(joins)
    wanted = joins_LE.numel() - round(ratio * joins_LE.numel())
    least = int((joins_LE == -1).sum())
    if wanted < least:
        raise ValueError(
            f"ratio {ratio} leaves {wanted} of {joins_LE.numel()} experts, and {least} must stay "
            f"for the router's choice of {router.experts_per_token} a token; use at most "
            f"{1 - least / joins_LE.numel():.4g}"
        )
    stays = torch.zeros(joins_LE.numel(), dtype=torch.bool)
    stays[joins_LE.flatten().argsort(stable=True)[:wanted]] = True
    routable: dict[int, torch.Tensor] = {}
    for layer, order_E, stays_E in zip(scores, orders, stays.view_as(joins_LE), strict=True):
        routable[layer] = torch.zeros_like(stays_E).index_copy_(0, order_E, stays_E)
    return Masks.whole(routable, size)


def _join_domains(sets_SK: torch.Tensor, v_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unique sets of all domains together, with their counts added."""
    unique_SK, position_S = torch.unique(sets_SK, dim=0, return_inverse=True)
    return unique_SK, torch.zeros(len(unique_SK), dtype=v_S.dtype).index_add_(0, position_S, v_S)


def _rest_frequencies(sets_SK: torch.Tensor, v_S: torch.Tensor, experts: int) -> torch.Tensor:
    """N(A∖i) for every set A and each of its experts i: float64 [S, K]."""
    num_sets, top_k = sets_SK.shape
    rests = torch.stack([sets_SK[:, torch.arange(top_k) != k] for k in range(top_k)], dim=1)
    flat = rests.view(num_sets * top_k, top_k - 1)
    if experts ** (top_k - 1) < 2**63:
        # One number per set sorts much faster than rows.
        powers = torch.tensor([experts**k for k in range(top_k - 1)])
        _, position = torch.unique((flat * powers).sum(dim=1), return_inverse=True)
    else:
        _, position = torch.unique(flat, dim=0, return_inverse=True)
    total = torch.zeros(int(position.max()) + 1, dtype=torch.float64)
    total.index_add_(0, position, v_S.repeat_interleave(top_k))
    return total[position].view(num_sets, top_k)


METHOD = Method(
    score_shape,
    "whole experts, by how they cooperate",
    prune_shape,
    selection=EXPERT_SELECTION,
    whole_experts=True,
)
