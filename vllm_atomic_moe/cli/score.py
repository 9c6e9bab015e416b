"""atomic-moe score: statistics -> scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.files.plain_files import check_output

# Shared by `score` and `prune`, which also have the options of the methods.
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain", help="Score by this domain's tokens only; repeat.", show_default="all domains"
    ),
]


def score(
    context: typer.Context,
    statistics: Annotated[
        Path, typer.Argument(metavar="STATS", help="File made by `atomic-moe calibrate`.")
    ],
    method: Annotated[str, typer.Option(help="…", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Score file to write (or replace).")
    ],
    domain: Domains = None,
) -> None:
    """Score every atom; higher is more important."""
    check_output(output)
    from vllm_atomic_moe.files.statistics import Statistics
    from vllm_atomic_moe.scoring.pruning import score_statistics

    scores = score_statistics(Statistics.read(statistics), method, context.obj, domain)
    scores.write(output)
    typer.echo(f"{output}: {method} scores of {len(scores.layers)} layers")
