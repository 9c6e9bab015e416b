"""atomic-moe import: another tool's pruning file -> profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import print_warning
from vllm_atomic_moe.cli.profiles import print_written


def import_profile(
    format_name: Annotated[
        str,
        typer.Argument(metavar="FORMAT", help="…"),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File of that format.")],
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Model to serve: local directory or Hugging Face id."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of profiles.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the profile; one of that name is replaced.",
            show_default="from FILE's name, with the percentage if there is a ratio",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Fraction to remove, 0 <= ratio < 1: of …. The other formats carry their own "
            "selection.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a profile from another tool's pruning file."""
    from vllm_atomic_moe.convert.importing import import_profile as run
    from vllm_atomic_moe.files.checkpoint import describe_checkpoint, resolve_model

    checkpoint = describe_checkpoint(resolve_model(model))
    profile, warnings = run(format_name, file, checkpoint, ratio=ratio, name=name)
    for warning in warnings:
        print_warning(warning)
    profile.write_into(output)
    print_written(profile, output, as_json, format=format_name, ratio=ratio)
