"""atomic-moe prune: statistics or scores -> profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import check_output, print_json, print_table
from vllm_atomic_moe.cli.profiles import WIDTH_COLUMNS, describe_widths


def prune(
    source: Annotated[
        Path,
        typer.Argument(metavar="STATS|SCORES", help="File made by `calibrate` or by `score`."),
    ],
    ratio: Annotated[float, typer.Option(help="Fraction of atoms to remove, 0 <= ratio < 1.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of profiles.")
    ],
    method: Annotated[
        str | None,
        typer.Option(help="heapr or random. A score file carries its own."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the profile; one of that name is replaced.",
            show_default="METHOD-PERCENT, as in heapr-25",
        ),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="global: the budget is over all layers together.")
    ] = "global",
    seed: Annotated[
        int | None, typer.Option(help="Seed (method random only).", show_default="0")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the profile that removes the least important atoms of all layers together.

    A profile of the same name is replaced, complete or not at all.
    """
    from vllm_atomic_moe.scoring.pruning import load_scores, make_profile

    if scope != "global":
        raise ValueError(f"scope {scope!r}: this version prunes with scope global only")

    profile = make_profile(load_scores(source, method, {"seed": seed}), ratio, name)
    path = output / f"{profile.name}.safetensors"
    check_output(path)
    profile.write(path)
    widths = describe_widths(profile)
    if as_json:
        print_json(
            {
                "name": profile.name,
                "file": str(path),
                "method": profile.metadata["method"],
                "ratio": ratio,
                "kept": profile.kept,
                "kept_atoms": profile.kept_atoms,
                "widths": widths,
            }
        )
        return
    print_table(
        ["profile", "kept", *WIDTH_COLUMNS],
        [[profile.name, f"{profile.kept:.2%}", *map(str, widths.values())]],
    )
    typer.echo(f"wrote {path}")
