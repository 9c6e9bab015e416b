"""atomic-moe card: a directory of profiles -> the card of their repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hugging Face id of the model the profiles are for."),
    ],
    profiles: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of profiles, to become a repository.")
    ],
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Output of `atomic-moe eval --json` for these profiles.",
            show_default="no perplexities",
        ),
    ] = None,
) -> None:
    """Write README.md for a Hub repository of profiles: model, methods, kept atoms, perplexities.

    It also writes the pictures widths.png and perplexity.png, and replaces an earlier card.
    """
    from vllm_atomic_moe.measure.card import write_card

    typer.echo(f"wrote {write_card(model, profiles, measured)}")
