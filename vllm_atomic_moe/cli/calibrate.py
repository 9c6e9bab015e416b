"""atomic-moe calibrate: model + text -> statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.console import check_output, print_warning


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local directory or Hugging Face id.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="FILE[:DOMAIN]",
            help="Text: .txt (one document), .jsonl (field text) or .parquet (column text). "
            "Repeat for more files; DOMAIN defaults to the file's stem.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Statistics file to write (or replace).")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Windows per domain.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows per forward; the sums do not depend on it.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed for drawing windows.")] = 0,
) -> None:
    """Run a model over text and sum up what the atoms of its experts do.

    One forward and one backward per window; two numbers per atom.
    """
    check_output(output)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from transformers.utils import logging

    from vllm_atomic_moe.calibration.collect import CalibrationOptions
    from vllm_atomic_moe.calibration.collect import calibrate as run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = CalibrationOptions(samples, seq_len, batch_size, dtype, device, seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Off a terminal a bar is noise among the lines of a log.
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("reading text and model", total=None)
        statistics, warnings = run(
            model,
            data,
            options,
            lambda done, total: progress.update(
                task, description="calibrating, windows", completed=done, total=total
            ),
        )
    statistics.write(output)
    for warning in warnings:
        print_warning(warning)
    domains = statistics.calibration["domains"]
    typer.echo(
        f"{output}: {statistics.calibration['tokens']} tokens, domains {', '.join(domains)}; "
        f"{len(statistics.sums)} layers of {statistics.model['num_experts']} experts of "
        f"{statistics.model['intermediate_size']} atoms"
    )
