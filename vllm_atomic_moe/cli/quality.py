"""atomic-moe quality: every method and the baselines at several ratios, as served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import quiet_vllm, status_lines
from vllm_atomic_moe.cli.options import (
    Field,
    HeldOut,
    Model,
    ServedDtype,
    TrustRemoteCode,
    Windows,
    WindowTokens,
)


def quality(
    model: Model,
    statistics: Annotated[
        Path, typer.Argument(metavar="STATS", help="File made by `atomic-moe calibrate`.")
    ],
    data: HeldOut,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="For quality.md, .json, .png and the profiles."
        ),
    ],
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Fraction to remove; repeat.", show_default="0.2, 0.4, 0.6"),
    ] = None,
    seq_len: WindowTokens = None,
    field: Field = None,
    samples: Windows = 128,
    dtype: ServedDtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare all methods: perplexity over dense with intervals, a table and a plot."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    quiet_vllm()
    from vllm_atomic_moe.measure.quality import RATIOS, measure_quality

    measure_quality(
        model,
        statistics,
        data,
        output,
        ratios=ratio or RATIOS,
        seq_len=seq_len,
        samples=samples,
        dtype=dtype,
        field=field,
        trust_remote_code=trust_remote_code,
        on_progress=status_lines(),
    )
    typer.echo((output / "quality.md").read_text().rstrip())
