"""Options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Local directory or Hugging Face id.")]
DATA_METAVAR = "PATH[:DOMAIN]"
DATA_HELP = (
    "a .txt (one document), .jsonl or .json (a list or lines), each also .gz, .parquet or .arrow "
    "file, a directory of such or saved by datasets, or a quoted glob."
)
HeldOut = Annotated[
    list[str],
    typer.Option(
        "--data", metavar=DATA_METAVAR, help=f"Held-out text: {DATA_HELP} Repeat for more."
    ),
]
WindowTokens = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per window.", show_default="the context, 2048 at most"),
]
Windows = Annotated[int, typer.Option(min=1, help="Windows per domain at most.")]
ServedDtype = Annotated[str, typer.Option(help="As vLLM's --dtype.")]
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

# What a fit is made on; as of `calibrate`.
FitData = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar=DATA_METAVAR,
        help="Calibration text to fit on; repeat.",
        show_default=False,
    ),
]
FitWindows = Annotated[int, typer.Option(min=1, help="Windows per domain, of the fit.")]
FitTokens = Annotated[int, typer.Option(min=2, help="Tokens per window, of the fit.")]
FitBatch = Annotated[int, typer.Option(min=1, help="Windows per forward, of the fit.")]
FitDtype = Annotated[str, typer.Option(help="As of `calibrate`, of the fit.")]
FitDevice = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N, of the fit.")]
