"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

Field = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Field or column of the files: text, or chat messages, which go through the model's "
        "template.",
        show_default="text, else messages",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python files that come with MODEL."),
]
