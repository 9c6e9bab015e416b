"""From a statistics or score file to a profile: the shell around the pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.router import expert_groups
from vllm_atomic_moe.files.statistics import FORMAT as STATISTICS_FORMAT
from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.files.tensors import model_shape, open_safetensors, shorten
from vllm_atomic_moe.scoring import (
    FOREIGN,
    known_methods,
    method_options,
    score_layers,
    select_masks,
    selection_options,
)
from vllm_atomic_moe.scoring.router import RouterNeeds
from vllm_atomic_moe.scoring.score_file import FORMAT as SCORES_FORMAT
from vllm_atomic_moe.scoring.score_file import Scores


def score_statistics(
    statistics: Statistics,
    method: str | None,
    given: Mapping[str, Any],
    domains: Sequence[str] | None = None,
) -> Scores:
    """Score every atom.

    Args:
        statistics: from calibration; not modified.
        method: a key of `scoring.known_methods().entries`.
        given: the method's options by name, those of masks are ignored; None means "not given".
        domains: score by these domains only; None means all.

    Raises:
        ValueError: no method is given, the method or domain does not exist, the method lacks an
            option, or the statistics lack sums that it needs.
    """
    if method is None:
        raise ValueError(
            "statistics can be scored in several ways; "
            f"give --method, one of {', '.join(known_methods().entries)}"
        )
    options = method_options(method, given)
    if domains:
        statistics = statistics.select(domains)
    layers = score_layers(method, statistics.sums, options)
    package = known_methods().packages.get(method)
    return Scores(method, options, statistics.model, statistics.calibration, layers, package)


def load_scores(
    path: Path,
    method: str | None,
    given: Mapping[str, Any],
    domains: Sequence[str] | None = None,
) -> Scores:
    """Scores read from a score file, or made from a statistics file.

    Args:
        path: either kind of file.
        method: required for statistics; for scores None or the method that made them.
        given: the method's options by name, those of scores for statistics only, those of masks
            are ignored; None means "not given".
        domains: score by these domains only, for statistics only.

    Raises:
        ValueError: the file is neither, or invalid, or method and options do not fit it.
    """
    with open_safetensors(path) as (metadata, _):
        kind = metadata.get("format")
    if kind == STATISTICS_FORMAT:
        return score_statistics(Statistics.read(path), method, given, domains)
    if kind != SCORES_FORMAT:
        raise ValueError(
            f"{path}: metadata `format` is {kind!r:.80}, wanted {STATISTICS_FORMAT!r} or "
            f"{SCORES_FORMAT!r}; give a file made by `atomic-moe calibrate` or `score`"
        )
    scores = Scores.read(path)
    if method not in (None, scores.method):
        raise ValueError(
            f"{path}: holds {scores.method} scores, --method says {method}; leave it out"
        )
    own = known_methods().entries.get(scores.method, FOREIGN)
    of_scores = {name: value for name, value in given.items() if name not in own.selection}
    asked = {**of_scores, "domain": domains or None}
    chosen = [name for name, value in asked.items() if value is not None]
    if chosen:
        flag = chosen[0].replace("_", "-")
        raise ValueError(f"{path}: scores are made already, --{flag} changes nothing; leave it out")
    return scores


def make_profile(
    scores: Scores, ratio: float, name: str | None = None, **given: Any
) -> PruningProfile:
    """The profile that removes `ratio` by the rule of the scores' method.

    Args:
        scores: not modified.
        ratio: fraction of atoms (of experts, for whole-expert methods) to remove, 0 <= ratio < 1.
        name: of the profile; None means METHOD-PERCENT, as in heapr-25.
        given: the method's options by name, those of scores are ignored; None means "not given".

    Raises:
        ValueError: the ratio is out of range, the method lacks an option, the budget cannot be
            met, the name is not allowed, or the package of the method is not installed.
    """
    if scores.package and scores.method not in known_methods().entries:
        raise ValueError(
            f"the scores are of method {scores.method!r} of the package {scores.package}, which is "
            "not installed here; install it"
        )
    options = selection_options(scores.method, given)
    masks = select_masks(scores.method, scores.layers, ratio, _router_needs(scores), options)
    name = name or f"{scores.method}-{ratio * 100:g}"
    profile = PruningProfile(name, masks.keep, masks.routable)
    metadata = {"ratio": str(ratio), "kept": str(profile.kept), **scores.metadata()}
    if options:
        metadata["selection"] = json.dumps(options)
    return replace(profile, metadata=metadata)


def unknown_groups(scores: Scores, profile: PruningProfile) -> str | None:
    """One line if a profile masks a router and the calibration does not tell if it has groups.

    Statistics of earlier versions do not tell; `make_profile` then assumes none.
    """
    if not profile.masks_routing or "expert_groups" in scores.calibration:
        return None
    return (
        f"profile {profile.name!r}: the calibration is of an earlier version and does not tell "
        "whether the router has groups of experts, which a server may then refuse; run "
        "`atomic-moe check`, or calibrate again"
    )


def _router_needs(scores: Scores) -> RouterNeeds:
    """The router's needs, from the calibration; methods that prune atoms do not use them."""
    if not known_methods().entries.get(scores.method, FOREIGN).whole_experts:
        return RouterNeeds(1)
    top_k, told = (scores.calibration.get(key) for key in ("experts_per_token", "expert_groups"))
    if type(top_k) is not int or top_k < 1:
        raise ValueError(
            f"calibration metadata `experts_per_token` is {shorten(top_k)}, wanted how many "
            f"experts of a layer {scores.method} must leave; score again"
        )
    if told is None:
        return RouterNeeds(top_k)
    _, num_experts, _ = model_shape(scores.model)
    try:
        groups = expert_groups(told["number"], told["chosen"], told["biased"], num_experts)
    except (KeyError, TypeError, ValueError):
        groups = None
    if groups is None:
        raise ValueError(
            f"calibration metadata `expert_groups` is {shorten(told)}, which no calibration "
            "writes; calibrate again"
        )
    return RouterNeeds(top_k, groups)
