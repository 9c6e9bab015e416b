"""atomic-moe score: statistics -> scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import check_output

METHODS_HELP = "heapr, tenp, shape, random, magnitude, camera, reap, frequency or random-experts."
# Options that `score` and `prune` share.
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain", help="Score by this domain's tokens only; repeat.", show_default="all domains"
    ),
]
AllowUnseen = Annotated[
    bool | None,
    typer.Option(
        "--allow-unseen",
        help="Score experts that saw fewer than 32 tokens like the others, instead of keeping "
        "them whole (heapr, tenp, camera).",
        show_default=False,
    ),
]
WeightByFrequency = Annotated[
    bool | None,
    typer.Option(
        "--weight-by-frequency",
        help="Weight scores by how often the expert is routed to (heapr).",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed (random, random-experts).", show_default="0")]


def score(
    statistics: Annotated[
        Path, typer.Argument(metavar="STATS", help="File made by `atomic-moe calibrate`.")
    ],
    method: Annotated[str, typer.Option(help=METHODS_HELP)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Score file to write (or replace).")
    ],
    domain: Domains = None,
    allow_unseen: AllowUnseen = None,
    weight_by_frequency: WeightByFrequency = None,
    seed: Seed = None,
) -> None:
    """Score every atom; higher is more important."""
    check_output(output)
    from vllm_atomic_moe.files.statistics import Statistics
    from vllm_atomic_moe.scoring.pruning import score_statistics

    given = {
        "allow_unseen": allow_unseen,
        "weight_by_frequency": weight_by_frequency,
        "seed": seed,
    }
    scores = score_statistics(Statistics.read(statistics), method, given, domain)
    scores.write(output)
    typer.echo(f"{output}: {method} scores of {len(scores.layers)} layers")
