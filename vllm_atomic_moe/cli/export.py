"""atomic-moe export: model + profile -> a compact checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import (
    print_json,
    print_note,
    print_warning,
    progress_bar,
    quiet_transformers,
)
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


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local directory or Hugging Face id.")
    ],
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="Profile file.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory to create; an export of the same model and profile is replaced.",
        ),
    ],
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Write an ordinary checkpoint for any engine. The profile must keep the same "
            "number of experts in every layer, all of one width.",
        ),
    ] = False,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Refit down_proj to the text of --data, so that the kept atoms offset the error "
            "of pruning; 16 bits a weight if the experts are quantized.",
        ),
    ] = False,
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
    """Write a checkpoint that holds only the atoms of one profile.

    It is served like the original (`vllm serve DIR --load-format atomic-pruned`), with the same
    answers, and is smaller on disk by the pruned bytes. With --plain any engine loads it. With
    --refit its answers are closer to those of the dense model.
    """
    from vllm_atomic_moe import api

    if refit:
        quiet_transformers()
    lines: list[str] = []
    with progress_bar("reading", "exporting", in_bytes=True) as show:
        result = api.export(
            model,
            profile,
            output,
            plain=plain,
            refit=refit,
            data=data or (),
            field=field,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            on_progress=show,
            on_note=print_note,
            on_warning=lines.append,
        )
    for line in lines:
        print_warning(line)
    if as_json:
        print_json(
            {
                "directory": str(result.directory),
                "profile": result.profile,
                "kept": result.kept,
                "weight_bytes": result.weight_bytes,
                "source_bytes": result.source_bytes,
                "shards": result.shards,
                "experts": result.experts,
                "width": result.width,
                "refit": result.refit,
            }
        )
        return
    shape = f"{result.experts} experts of width {result.width} a layer, " if plain else ""
    typer.echo(
        f"{result.directory}: {result.profile}, {result.kept:.2%} of atoms, {shape}"
        f"{result.weight_bytes / 2**20:.2f} MiB of weights (from "
        f"{result.source_bytes / 2**20:.2f} MiB) in {result.shards} "
        f"shard{'s' if result.shards > 1 else ''}"
    )
    if result.refit:
        codes, plain_rows = result.refit["down_proj_bytes"]
        if codes != plain_rows:
            typer.echo(
                f"refitted down_proj: {plain_rows / 2**20:.2f} MiB of plain weights instead of "
                f"{codes / 2**20:.2f} MiB of codes and scales"
            )
