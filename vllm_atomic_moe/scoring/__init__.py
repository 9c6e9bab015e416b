"""Scoring: statistics become scores, scores become masks.

Pure functions, one method per file; this file lists the methods. A method has two halves:

- `score_layer` takes one layer's sums, the layer's index and its own options, and returns that
  layer's scores; higher = more important, +inf means "stays", NaN is refused.
- `select` takes the scores of all layers and a ratio, and returns masks.

Legend: E experts, I full intermediate size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring.budget import check_ratio, prune_atoms
from vllm_atomic_moe.scoring.camera import score_camera
from vllm_atomic_moe.scoring.frequency import score_frequency
from vllm_atomic_moe.scoring.heapr import score_heapr
from vllm_atomic_moe.scoring.magnitude import score_magnitude
from vllm_atomic_moe.scoring.masks import LayerScores, Masks
from vllm_atomic_moe.scoring.random import score_random, score_random_experts
from vllm_atomic_moe.scoring.reap import score_reap
from vllm_atomic_moe.scoring.router import RouterNeeds
from vllm_atomic_moe.scoring.shape import prune_shape, score_shape
from vllm_atomic_moe.scoring.tenp import prune_tenp, score_tenp
from vllm_atomic_moe.scoring.whole import prune_experts

UNSEEN = {"allow_unseen": False}
ATOM_SELECTION = {"scope": "global", "align": 1, "min_width": 0}
EXPERT_SELECTION = {"scope": "global"}


@dataclass(frozen=True, slots=True)
class Method:
    """A way to prune.

    Attributes:
        score_layer: (sums of the layer, layer index, **options) -> LayerScores.
        select: (LayerScores by layer, ratio, **selection) -> Masks; with `whole_experts`,
            (LayerScores by layer, ratio, RouterNeeds, **selection) -> Masks.
        options: options of `score_layer` with their defaults; a method that has `allow_unseen`
            protects experts with few tokens unless it is set.
        selection: options of `select` with their defaults.
        whole_experts: it removes whole experts, and the router must be left what it needs.
    """

    score_layer: Callable[..., LayerScores]
    select: Callable[..., Masks] = prune_atoms
    options: Mapping[str, Any] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=lambda: ATOM_SELECTION)
    whole_experts: bool = False


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "heapr": Method(score_heapr, options={"weight_by_frequency": False, **UNSEEN}),
        "tenp": Method(
            score_tenp,
            prune_tenp,
            UNSEEN,
            {"alpha": None, "trapezoid": "1:2", "align": 1},
        ),
        "shape": Method(score_shape, prune_shape, selection=EXPERT_SELECTION, whole_experts=True),
        "random": Method(score_random, options={"seed": 0}),
        "magnitude": Method(score_magnitude),
        "camera": Method(score_camera, options=UNSEEN),
        "reap": Method(score_reap, prune_experts, selection=EXPERT_SELECTION, whole_experts=True),
        "frequency": Method(
            score_frequency, prune_experts, selection=EXPERT_SELECTION, whole_experts=True
        ),
        "random-experts": Method(
            score_random_experts, prune_experts, {"seed": 0}, EXPERT_SELECTION, whole_experts=True
        ),
    }
)
# Scores from other tools rank atoms.
FOREIGN = Method(score_layer=lambda *_: LayerScores(torch.empty(0)))


def method_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the method's scores: its defaults, overridden by those given (None: not given).

    Raises:
        ValueError: no such method, or an option it does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; wanted one of {', '.join(METHODS)}")
    return _override(method, METHODS[method].options, given)


def selection_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the method's masks, likewise; an unknown method's scores rank atoms.

    Raises:
        ValueError: an option it does not have.
    """
    return _override(method, METHODS.get(method, FOREIGN).selection, given)


def score_layers(
    method: str, sums: Mapping[int, LayerSums], options: Mapping[str, Any]
) -> dict[int, LayerScores]:
    """Scores of every layer.

    Unless the option `allow_unseen` is set, the scores of experts with few tokens
    (`LayerSums.few_tokens`) are +inf. Methods without that option do not score atoms by tokens.

    Args:
        method: a key of METHODS.
        sums: layer index -> sums; not modified.
        options: what `method_options` returned.

    Raises:
        ValueError: the method needs sums that are not there.
    """
    own = {name: value for name, value in options.items() if name != "allow_unseen"}
    scores: dict[int, LayerScores] = {}
    for layer, of_layer in sums.items():
        scores[layer] = METHODS[method].score_layer(of_layer, layer, **own)
        if options.get("allow_unseen") is False:
            scores[layer] = scores[layer].protect(of_layer.few_tokens)
    return scores


def select_masks(
    method: str,
    scores: Mapping[int, LayerScores],
    ratio: float,
    router: RouterNeeds,
    options: Mapping[str, Any],
) -> Masks:
    """The masks that remove `ratio` of the atoms (or experts) by the method's rule.

    Args:
        method: the method that made the scores.
        scores: not modified.
        ratio: 0 <= ratio < 1.
        router: what must stay where experts go whole.
        options: what `selection_options` returned.

    Raises:
        ValueError: the ratio is out of range, the scores hold NaN, or the budget cannot be met.
    """
    check_ratio(ratio)
    if not scores:
        raise ValueError("no layers to prune; score a Mixture-of-Experts model")
    for layer, of_layer in scores.items():
        if of_layer.has_nan():
            raise ValueError(f"layers.{layer}.score holds NaN; calibrate and score again")
    ordered = dict(sorted(scores.items()))
    kind = METHODS.get(method, FOREIGN)
    needs = (router,) if kind.whole_experts else ()
    return kind.select(ordered, ratio, *needs, **options)


def _override(method: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(defaults)
    for name, value in given.items():
        if value is None:
            continue
        if name not in options:
            flag = name.replace("_", "-")
            raise ValueError(f"method {method!r} has no option --{flag}; leave it out")
        options[name] = value
    return options
