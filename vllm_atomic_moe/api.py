"""What the commands do, as functions of the same names, options and defaults.

    statistics = calibrate("MODEL", ["text.jsonl"], seq_len=512)
    profile = prune(statistics, 0.25, "profiles", method="heapr")
    rows = evaluate("MODEL", ["heldout.txt"], profiles="profiles")

Files are paths or strings; what can be repeated on the command line is a list. Nothing is printed:
progress and warnings go to callbacks. What is refused raises ValueError with one line.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_atomic_moe.convert.exporting import export as exporting
from vllm_atomic_moe.convert.exporting.export import ExportResult, Refitted
from vllm_atomic_moe.files.plain_files import check_output
from vllm_atomic_moe.files.profiles import PruningProfile as Profile
from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.measure.incomplete import IncompleteError
from vllm_atomic_moe.scoring.method import Value
from vllm_atomic_moe.scoring.pruning import (
    load_scores,
    make_profile,
    score_statistics,
    unknown_groups,
)

if TYPE_CHECKING:
    from vllm_atomic_moe.calibration.refit import Kind, ModelFit
    from vllm_atomic_moe.measure.evaluation import Row

__all__ = [
    "ExportResult",
    "IncompleteError",
    "Profile",
    "Statistics",
    "calibrate",
    "evaluate",
    "export",
    "prune",
]

File = str | os.PathLike[str]


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def calibrate(
    model: File,
    data: Sequence[str],
    output: File | None = None,
    *,
    field: str | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    gradients: bool = True,
    shard: str | None = None,
    stream: bool | None = None,
    scratch: File | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda line: None,
    on_warning: Callable[[str], None] = _warn,
) -> Statistics:
    """Run a model over text and sum up what the atoms of its experts do.

    Processes that torchrun started share the windows, and all return the same; only the first one
    writes the file and calls `on_note` and `on_warning`.

    Args:
        model: local directory or Hugging Face id.
        data: `PATH[:DOMAIN]`, at least one.
        output: statistics file to write or replace; None writes none.
        field: field or column of the files; None means `text`, else `messages`.
        samples: windows per domain.
        seq_len: tokens per window.
        batch_size: windows per forward; the sums do not depend on it.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        seed: for drawing windows.
        gradients: run the backward pass, which heapr needs.
        shard: `i/N`, to run this part of the windows only.
        stream: run layer by layer; None: if the weights do not fit the free memory.
        scratch: directory for layers' inputs; implies `stream`, and continues after a kill.
        trust_remote_code: run Python files that come with the model.
        on_progress: called with (steps done, steps in all).
        on_note: called with a line that says how the run is done, before it starts.
        on_warning: called with one line.

    Raises:
        ValueError: text, model or an option is refused, or the output cannot be written.
        OSError: the model's files cannot be read.
    """
    from vllm_atomic_moe.calibration.collect import CalibrationOptions
    from vllm_atomic_moe.calibration.collect import calibrate as run
    from vllm_atomic_moe.calibration.ranks import Ranks

    if output is not None:
        check_output(Path(output))
    options = CalibrationOptions(
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        seed=seed,
        gradients=gradients,
        shard=shard,
        stream=stream,
        scratch=None if scratch is None else Path(scratch),
        field=field,
        trust_remote_code=trust_remote_code,
    )
    first = Ranks.here().rank == 0
    note = on_note if first else lambda line: None
    statistics, lines = run(os.fspath(model), data, options, on_progress, note)
    if output is not None and first:
        statistics.write(Path(output))
    for line in lines if first else ():
        on_warning(line)
    return statistics


def prune(
    source: File | Statistics,
    ratio: float,
    output: File | None = None,
    *,
    method: str | None = None,
    name: str | None = None,
    domain: Sequence[str] | None = None,
    compensate: File | None = None,
    data: Sequence[str] | None = None,
    field: str | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    on_note: Callable[[str], None] = lambda line: None,
    on_warning: Callable[[str], None] = _warn,
    **options: Value | None,
) -> Profile:
    """The profile that removes the least important atoms or experts.

    Args:
        source: statistics, their file, or a score file.
        ratio: fraction of atoms (shape, reap: of experts) to remove, 0 <= ratio < 1.
        output: directory to write NAME.safetensors to, which is replaced; None writes none.
        method: name of the method; None for a score file, which carries its own.
        name: of the profile; None means METHOD-PERCENT, as in heapr-25.
        domain: score by the tokens of these domains only; None means all.
        compensate: the model, local directory or Hugging Face id, to fit a scale and a bias of
            every expert's output to, to offset the error of pruning; None fits none.
        data: `PATH[:DOMAIN]`, the text to fit on.
        field, samples, seq_len, batch_size, dtype, device, trust_remote_code: as of `calibrate`,
            of the fit.
        on_note: called with a line about every layer that was fitted.
        on_warning: called with one line.
        options: of the method, such as `scope` and `align`; None means its default.

    Raises:
        ValueError: the source, the method, an option or the ratio is refused, or the output cannot
            be written.
    """
    _check_fit("--compensate MODEL", compensate is not None, data)
    if isinstance(source, Statistics):
        scores = score_statistics(source, method, options, domain)
    else:
        scores = load_scores(Path(source), method, options, domain)
    profile = make_profile(scores, ratio, name, **options)
    if compensate is not None:
        fitted = _fit(
            compensate,
            profile,
            "scale and bias",
            data or (),
            on_note,
            on_warning,
            field=field,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        report = {"compensation": json.dumps(fitted.report())}
        profile = replace(
            profile,
            compensation=fitted.compensation(),
            metadata={**profile.metadata, **report},
        )
    if output is not None:
        profile.write_into(Path(output))
    if line := unknown_groups(scores, profile):
        on_warning(line)
    return profile


def export(
    model: File,
    profile: File,
    output: File,
    *,
    plain: bool = False,
    refit: bool = False,
    data: Sequence[str] | None = None,
    field: str | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda line: None,
    on_warning: Callable[[str], None] = _warn,
) -> ExportResult:
    """Write a checkpoint that holds the atoms of one profile only.

    Args:
        model: local directory or Hugging Face id.
        profile: profile file.
        output: directory to make; an export of the same model and profile is replaced.
        plain: write an ordinary checkpoint, for engines that do not know profiles.
        refit: refit down_proj, so that the kept atoms offset the error of pruning.
        data: `PATH[:DOMAIN]`, the text to fit on.
        field, samples, seq_len, batch_size, dtype, device, trust_remote_code: as of `calibrate`,
            of the fit.
        on_progress: called with (bytes written, bytes in all).
        on_note: called with a line about every layer that was fitted.
        on_warning: called with one line.

    Raises:
        ValueError: model, profile, text or output is refused, or the disk is too small.
        OSError: a file cannot be read or written.
    """
    _check_fit("--refit", refit, data)

    def fit_columns(chosen: Profile) -> Refitted:
        fitted = _fit(
            model,
            chosen,
            "columns",
            data or (),
            on_note,
            on_warning,
            field=field,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        return Refitted(fitted.columns(), fitted.report())

    result = exporting.export(
        os.fspath(model),
        Path(profile),
        Path(output),
        plain=plain,
        refit=fit_columns if refit else None,
        on_progress=on_progress,
    )
    for line in result.warnings:
        on_warning(line)
    return result


def _check_fit(flag: str, wanted: bool, data: Sequence[str] | None) -> None:
    """Refuse a fit without text, and text without a fit.

    Raises:
        ValueError: one of them is missing.
    """
    if wanted and not data:
        raise ValueError("a fit needs text; name it with --data PATH[:DOMAIN]")
    if data and not wanted:
        raise ValueError(f"--data is for {flag}; add it, or leave --data out")


def _fit(
    model: File,
    profile: Profile,
    kind: Kind,
    data: Sequence[str],
    on_note: Callable[[str], None],
    on_warning: Callable[[str], None],
    **options: Any,
) -> ModelFit:
    """Compensate for what a profile prunes.

    Args:
        options: fields of `CalibrationOptions`.

    Raises:
        ValueError: as for `fit_model`.
    """
    from vllm_atomic_moe.calibration.collect import CalibrationOptions
    from vllm_atomic_moe.calibration.refit import fit_model

    chosen = CalibrationOptions(gradients=False, **options)
    fitted = fit_model(os.fspath(model), profile, kind, data, chosen, on_note)
    for line in fitted.warnings:
        on_warning(line)
    return fitted


def evaluate(
    model: File,
    data: Sequence[str],
    *,
    profiles: File | None = None,
    profile: Sequence[str] | None = None,
    seq_len: int | None = None,
    field: str | None = None,
    samples: int = 128,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[Row]:
    """Measure perplexity with vLLM: dense first, then every profile, on the same text.

    vLLM runs in this process: it sets VLLM_ENABLE_V1_MULTIPROCESSING=0 in its environment. Call it
    under `if __name__ == "__main__":`. Warnings go to vLLM's log.

    Args:
        model: local directory or Hugging Face id.
        data: held-out text, `PATH[:DOMAIN]`, at least one.
        profiles: directory of profiles, or a Hub repository of them; None means
            MODEL/atomic_profiles.
        profile: names of the profiles to measure; None means all.
        seq_len: tokens per window; None means the context, 2048 at most.
        field: field or column of the files; None means `text`, else `messages`.
        samples: windows per domain at most.
        dtype: as vLLM's --dtype.
        trust_remote_code: run Python files that come with the model.
        on_progress: called with (profiles done, profiles in all, the next profile).

    Raises:
        ValueError: text, model, profile or an option is refused, before any engine starts.
        IncompleteError: vLLM fails; its `measured` has the rows measured before.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_atomic_moe.measure.evaluation import evaluate as run

    return run(
        os.fspath(model),
        None if profiles is None else os.fspath(profiles),
        data,
        names=profile or (),
        seq_len=seq_len,
        samples=samples,
        dtype=dtype,
        field=field,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress,
    )
