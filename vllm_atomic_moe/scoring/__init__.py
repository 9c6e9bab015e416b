"""Scoring: statistics become scores, scores become masks.

Pure functions. `method.py` defines a method, each file of `methods/` has one, and `known_methods()`
lists them together with those of installed packages.

Legend: E experts, I full intermediate size, K experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from vllm_atomic_moe.files.registry import Registry, load_registry
from vllm_atomic_moe.files.statistics import OPTIONAL, LayerSums
from vllm_atomic_moe.files.tensors import shorten
from vllm_atomic_moe.scoring.budget import check_ratio
from vllm_atomic_moe.scoring.masks import LayerScores, Masks
from vllm_atomic_moe.scoring.method import Method, Option
from vllm_atomic_moe.scoring.router import RouterNeeds

ENTRY_POINTS = "atomic_moe.methods"
# Names that the command and the function use for something else.
RESERVED = (
    *("source", "statistics", "ratio", "output", "method", "name", "domain", "compensate", "data"),
    *("field", "samples", "seq_len", "batch_size", "dtype", "device", "trust_remote_code"),
    *("on_note", "on_warning", "options", "context", "as_json", "json", "help"),
)
# Scores from other tools rank atoms.
FOREIGN = Method(lambda *_: LayerScores(torch.empty(0)), "atoms, by another tool")


@functools.cache
def known_methods() -> Registry[Method]:
    """Every method by name: ours, and those that installed packages register."""
    package = f"{__name__}.methods"
    return load_registry("method", ENTRY_POINTS, package, "METHOD", Method, _check_method)


def method_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the method's scores: its defaults, overridden by those given (None: not given).

    Its options of masks may be among those given.

    Raises:
        ValueError: an unknown method, an option it does not have, or a value of another type.
    """
    kind = known_methods().find(method)
    return _override(method, kind.options, given, beside=kind.selection)


def selection_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the method's masks, likewise; scores of an unknown method rank atoms.

    Raises:
        ValueError: an option it does not have, or a value of another type.
    """
    kind = known_methods().entries.get(method, FOREIGN)
    return _override(method, kind.selection, given, beside=kind.options)


def score_layers(
    method: str, sums: Mapping[int, LayerSums], options: Mapping[str, Any]
) -> dict[int, LayerScores]:
    """Scores of every layer.

    Unless the option `allow_unseen` is set, the scores of experts with few tokens
    (`LayerSums.few_tokens`) are +inf. Methods without that option do not score atoms by tokens.

    Args:
        method: a key of `known_methods().entries`.
        sums: layer index -> sums; not modified.
        options: from `method_options`.

    Raises:
        ValueError: the method needs sums that are missing.
    """
    own = {name: value for name, value in options.items() if name != "allow_unseen"}
    kind = known_methods().find(method)
    scores: dict[int, LayerScores] = {}
    for layer, of_layer in sums.items():
        for name in kind.needs:
            if getattr(of_layer, name) is None:
                raise ValueError(
                    f"the statistics lack {name}, which {method} needs (made with "
                    f"{OPTIONAL[name]}); calibrate without that flag"
                )
        scores[layer] = kind.score_layer(of_layer, layer, **own)
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
        router: what must stay if whole experts are removed.
        options: from `selection_options`.

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
    kind = known_methods().entries.get(method, FOREIGN)
    needs = (router,) if kind.whole_experts else ()
    return kind.select(ordered, ratio, *needs, **options)


def _override(
    method: str, known: Mapping[str, Option], given: Mapping[str, Any], beside: Mapping[str, Option]
) -> dict[str, Any]:
    """The defaults of `known`, overridden; options of `beside` are ignored."""
    options: dict[str, Any] = {name: option.default for name, option in known.items()}
    for name, value in given.items():
        if value is None or name in beside:
            continue
        if name not in known:
            flag = name.replace("_", "-")
            raise ValueError(f"method {method!r} has no option --{flag}; leave it out")
        if not known[name].takes(value):
            raise ValueError(
                f"method {method!r}: {name} is {shorten(value)}, "
                f"wanted {getattr(known[name].kind, '__name__', '')}"
            )
        options[name] = value
    return options


def _check_method(method: Method, others: Mapping[str, Method]) -> None:
    """Refuse options that conflict with those of other methods on one command line, and unknown
    needs.
    """
    for name in method.needs:
        if name not in OPTIONAL:
            raise ValueError(f"it needs {name!r}; wanted names among {', '.join(OPTIONAL)}")
    for name, option in {**method.options, **method.selection}.items():
        if not name.isidentifier() or name in RESERVED:
            raise ValueError(f"its option {name!r} cannot have that name")
        if name in method.options and name in method.selection:
            raise ValueError(f"its option {name!r} is one of scores and one of masks; rename one")
        for other, there in others.items():
            known = {**there.options, **there.selection}.get(name)
            if known is not None and known.kind is not option.kind:
                raise ValueError(
                    f"its option {name!r} is of another type than that of {other}; rename it"
                )
