"""atomic-moe prune: statistics or scores -> profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import print_note, print_warning, quiet_transformers
from vllm_atomic_moe.cli.options import (
    Field,
    FitBatch,
    FitData,
    FitDevice,
    FitDtype,
    FitTokens,
    FitWindows,
    TrustRemoteCode,
)
from vllm_atomic_moe.cli.profiles import print_written
from vllm_atomic_moe.cli.score import Domains


def prune(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(metavar="STATS|SCORES", help="File made by `calibrate` or by `score`."),
    ],
    ratio: Annotated[
        float,
        typer.Option(help="Fraction of atoms (…: of experts) to remove, 0 <= ratio < 1."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of profiles.")
    ],
    method: Annotated[
        str | None, typer.Option(help="…. A score file carries its own.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the profile; one of that name is replaced.",
            show_default="METHOD-PERCENT, as in heapr-25",
        ),
    ] = None,
    domain: Domains = None,
    compensate: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Fit a scale and a bias of every expert's output to this model and the text of "
            "--data, to offset the error of pruning.",
            show_default=False,
        ),
    ] = None,
    data: FitData = None,
    field: Field = None,
    samples: FitWindows = 128,
    seq_len: FitTokens = 2048,
    batch_size: FitBatch = 1,
    dtype: FitDtype = "auto",
    device: FitDevice = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the profile that removes the least important atoms or experts.

    A profile of the same name is replaced, complete or not at all.
    """
    from vllm_atomic_moe import api

    if compensate is not None:
        quiet_transformers()
    lines: list[str] = []
    profile = api.prune(
        source,
        ratio,
        output,
        method=method,
        name=name,
        domain=domain,
        compensate=compensate,
        data=data,
        field=field,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        on_note=print_note,
        on_warning=lines.append,
        **context.obj,
    )
    print_written(profile, output, as_json, ratio=ratio)
    for line in lines:
        print_warning(line)
