"""atomic-moe score: statistics -> scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import check_output


def score(
    statistics: Annotated[
        Path, typer.Argument(metavar="STATS", help="File made by `atomic-moe calibrate`.")
    ],
    method: Annotated[str, typer.Option(help="heapr or random.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Score file to write (or replace).")
    ],
    seed: Annotated[
        int | None, typer.Option(help="Seed (method random only).", show_default="0")
    ] = None,
) -> None:
    """Score every atom; higher is more important."""
    check_output(output)
    from vllm_atomic_moe.calibration.statistics import Statistics
    from vllm_atomic_moe.scoring.pruning import score_statistics

    scores = score_statistics(Statistics.read(statistics), method, {"seed": seed})
    scores.write(output)
    typer.echo(f"{output}: {method} scores of {len(scores.scores)} layers")
