"""atomic-moe prune: statistics or scores -> profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import print_warning
from vllm_atomic_moe.cli.profiles import write_profile
from vllm_atomic_moe.cli.score import (
    METHODS_HELP,
    AllowUnseen,
    Domains,
    Seed,
    WeightByFrequency,
)


def prune(
    source: Annotated[
        Path,
        typer.Argument(metavar="STATS|SCORES", help="File made by `calibrate` or by `score`."),
    ],
    ratio: Annotated[
        float,
        typer.Option(
            help="Fraction of atoms to remove (of experts, if they go whole), 0 <= ratio < 1."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of profiles.")
    ],
    method: Annotated[
        str | None, typer.Option(help=f"{METHODS_HELP} A score file carries its own.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the profile; one of that name is replaced.",
            show_default="METHOD-PERCENT, as in heapr-25",
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="global: all layers compete; layer or expert: each loses the same. Whole experts: "
            "global, layer, or group (each group of the router loses the same).",
            show_default="global",
        ),
    ] = None,
    align: Annotated[
        int | None,
        typer.Option(
            help="Make every width a multiple of this (atoms; with --scope expert the nearest).",
            show_default="1",
        ),
    ] = None,
    min_width: Annotated[
        int | None,
        typer.Option(help="Atoms that every expert keeps (atoms).", show_default="0"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Fraction of experts that stay whole (tenp).", show_default="(1 - ratio) / 2"
        ),
    ] = None,
    trapezoid: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Whole experts of the first and the last layer, in proportion (tenp).",
            show_default="1:2",
        ),
    ] = None,
    domain: Domains = None,
    allow_unseen: AllowUnseen = None,
    weight_by_frequency: WeightByFrequency = None,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the profile that removes the least important atoms or experts.

    A profile of the same name is replaced, complete or not at all.
    """
    from vllm_atomic_moe.scoring.pruning import load_scores, make_profile, unknown_groups

    given = {
        "allow_unseen": allow_unseen,
        "weight_by_frequency": weight_by_frequency,
        "seed": seed,
    }
    scores = load_scores(source, method, given, domain)
    profile = make_profile(
        scores,
        ratio,
        name,
        scope=scope,
        align=align,
        min_width=min_width,
        alpha=alpha,
        trapezoid=trapezoid,
    )
    write_profile(profile, output, as_json, ratio=ratio)
    if warning := unknown_groups(scores, profile):
        print_warning(warning)
