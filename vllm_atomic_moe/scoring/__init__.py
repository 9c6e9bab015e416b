"""Scoring: statistics become scores, scores become masks (DESIGN §6).

Pure functions, one method a file; this file is the list of methods. A method scores one layer: it
is given the layer's sums, the layer's index and its own options, and returns float32 [E, I], higher
= more important. +inf means "keep whatever else goes"; NaN is refused.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe.scoring.heapr import score_heapr
from vllm_atomic_moe.scoring.random import score_random


@dataclass(frozen=True, slots=True)
class Method:
    """A way to score atoms.

    Attributes:
        score_layer: (sums of the layer, layer index, **options) -> float32 [E, I].
        options: the method's own options with their defaults.
    """

    score_layer: Callable[..., torch.Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "heapr": Method(score_heapr),
        "random": Method(score_random, {"seed": 0}),
    }
)


def method_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options: its defaults, overridden by those given that are not None.

    Raises:
        ValueError: no such method, or an option it does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; wanted one of {', '.join(METHODS)}")
    options = dict(METHODS[method].options)
    for name, value in given.items():
        if value is None:
            continue
        if name not in options:
            raise ValueError(f"method {method!r} has no option --{name}; leave it out")
        options[name] = value
    return options


def score_layers(
    method: str, sums: Mapping[int, Mapping[str, torch.Tensor]], options: Mapping[str, Any]
) -> dict[int, torch.Tensor]:
    """Scores of every layer: layer index -> float32 [E, I].

    Args:
        method: a key of METHODS.
        sums: layer index -> name -> float64 sums, as in a statistics file; not modified.
        options: what `method_options` returned.
    """
    score_layer = METHODS[method].score_layer
    return {layer: score_layer(tensors, layer, **options) for layer, tensors in sums.items()}
