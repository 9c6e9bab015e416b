"""atomic-moe eval: perplexity per domain and profile, as served."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import print_json, print_table


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local directory or Hugging Face id.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="FILE[:DOMAIN]", help="Held-out text; repeat for more files."
        ),
    ],
    profiles: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Directory of profiles.", show_default="MODEL/atomic_profiles"
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", help="Measure this profile; repeat.", show_default="all"),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window.", show_default="the context, 2048 at most"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows per domain at most.")] = 128,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity with vLLM: dense first, then every profile, on the same text."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from rich.console import Console

    from vllm_atomic_moe.serving.evaluation import evaluate as run

    console = Console(stderr=True)

    def report(done: int, total: int, name: str) -> None:
        if name:
            console.print(f"[{done + 1}/{total}] {name}", markup=False, highlight=False)

    rows = run(
        model,
        profiles,
        data,
        names=profile or (),
        seq_len=seq_len,
        samples=samples,
        dtype=dtype,
        on_progress=report,
    )
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    dense = rows[0].perplexity
    print_table(
        ["profile", "kept", "MiB", "Δ all", *dense],
        [
            [
                row.profile,
                f"{row.kept:.1%}",
                f"{row.kept_bytes / 2**20:.2f}",
                f"{row.perplexity['all'] / dense['all'] - 1:+.1%}",
                *(f"{value:.2f}" for value in row.perplexity.values()),
            ]
            for row in rows
        ],
    )
