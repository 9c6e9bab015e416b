"""From a statistics or score file to a profile: the shell around the pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_atomic_moe.calibration.statistics import FORMAT as STATISTICS_FORMAT
from vllm_atomic_moe.calibration.statistics import Statistics
from vllm_atomic_moe.profiles import PruningProfile
from vllm_atomic_moe.scoring import METHODS, method_options, score_layers
from vllm_atomic_moe.scoring.budget import global_masks
from vllm_atomic_moe.scoring.score_file import FORMAT as SCORES_FORMAT
from vllm_atomic_moe.scoring.score_file import Scores
from vllm_atomic_moe.tensor_files import open_safetensors


def score_statistics(statistics: Statistics, method: str, given: Mapping[str, Any]) -> Scores:
    """Score every atom.

    Args:
        statistics: what calibration left; not modified.
        method: a key of `scoring.METHODS`.
        given: method options by name; None means "not given".

    Raises:
        ValueError: no such method, or an option it does not have.
    """
    options = method_options(method, given)
    return Scores(
        method=method,
        options=options,
        model=statistics.model,
        calibration=statistics.calibration,
        scores=score_layers(method, statistics.sums, options),
    )


def load_scores(path: Path, method: str | None, given: Mapping[str, Any]) -> Scores:
    """Scores out of a score file, or made from a statistics file.

    Args:
        path: either kind of file.
        method: wanted for statistics; for scores None or the method they were made with.
        given: method options by name, for statistics only; None means "not given".

    Raises:
        ValueError: the file is neither, it is invalid, or method and options do not go with it.
    """
    with open_safetensors(path) as (metadata, _):
        kind = metadata.get("format")
    if kind == STATISTICS_FORMAT:
        if method is None:
            raise ValueError(
                f"{path}: statistics can be scored in several ways; "
                f"give --method, one of {', '.join(METHODS)}"
            )
        return score_statistics(Statistics.read(path), method, given)
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
    if chosen := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"{path}: scores are made already, --{chosen[0]} changes nothing; leave it out"
        )
    return scores


def make_profile(scores: Scores, ratio: float, name: str | None = None) -> PruningProfile:
    """The profile that removes the `ratio` of atoms with the lowest scores over all layers.

    Args:
        scores: not modified.
        ratio: fraction of atoms to remove, 0 <= ratio < 1.
        name: of the profile; METHOD-PERCENT if None, as in heapr-25.

    Raises:
        ValueError: the ratio is out of range or the name is not allowed.
    """
    keep = global_masks(scores.scores, ratio)
    atoms = sum(mask.numel() for mask in keep.values())
    kept = sum(int(mask.sum()) for mask in keep.values()) / atoms
    metadata = {"ratio": str(ratio), "kept": str(kept), **scores.metadata()}
    return PruningProfile(name or f"{scores.method}-{ratio * 100:g}", keep, metadata=metadata)
