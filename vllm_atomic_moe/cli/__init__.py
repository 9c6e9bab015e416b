"""The command line `atomic-moe`: arguments and tables, nothing else.

Each subcommand has a file. torch, transformers and vllm are imported inside the commands, so that
`atomic-moe --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_atomic_moe.cli.admin import activate, list_profiles, load, show_status, unload
from vllm_atomic_moe.cli.bench import bench
from vllm_atomic_moe.cli.calibrate import calibrate
from vllm_atomic_moe.cli.card import card
from vllm_atomic_moe.cli.check import check
from vllm_atomic_moe.cli.console import OneLineErrors, show_version
from vllm_atomic_moe.cli.eval import evaluate
from vllm_atomic_moe.cli.export import export
from vllm_atomic_moe.cli.import_profile import import_profile
from vllm_atomic_moe.cli.merge import merge
from vllm_atomic_moe.cli.plugins import ImporterCommand, PruneCommand, ScoreCommand
from vllm_atomic_moe.cli.prune import prune
from vllm_atomic_moe.cli.quality import quality
from vllm_atomic_moe.cli.score import score
from vllm_atomic_moe.cli.show import show

app = typer.Typer(
    name="atomic-moe",
    cls=OneLineErrors,
    help="Prune Mixture-of-Experts models inside their experts; vLLM serves the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show full traces, and what transformers reports."),
    ] = False,
) -> None:
    """Prune Mixture-of-Experts models inside their experts; vLLM serves the result."""


app.command()(calibrate)
app.command()(merge)
app.command(cls=ScoreCommand)(score)
app.command(cls=PruneCommand)(prune)
app.command("import", cls=ImporterCommand)(import_profile)
app.command()(show)
app.command()(check)
app.command()(export)
app.command("eval")(evaluate)
app.command()(card)
app.command()(quality)
app.command()(bench)
app.command("status")(show_status)
app.command("profiles")(list_profiles)
app.command()(activate)
app.command()(load)
app.command()(unload)
