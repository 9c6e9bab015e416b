"""atomic-moe calibrate: model + text -> statistics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_atomic_moe.cli.console import (
    print_json,
    print_note,
    print_table,
    print_warning,
    progress_bar,
    quiet_transformers,
)
from vllm_atomic_moe.cli.options import DATA_HELP, DATA_METAVAR, Field, TrustRemoteCode
from vllm_atomic_moe.cli.profiles import calibrated

SHOWN_EXPERTS = 20


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local directory or Hugging Face id.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar=DATA_METAVAR,
            help=f"Text: {DATA_HELP} Repeat for more; DOMAIN defaults to the name.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Statistics file to write (or replace).")
    ],
    field: Field = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows per domain.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows per forward; the sums do not depend on it.")
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16. auto is the checkpoint's, or float32 on a "
            "CPU without instructions for it."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed for drawing windows.")] = 0,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients/--no-gradients",
            help="Run the backward pass; without it every method but heapr can be scored.",
        ),
    ] = True,
    shard: Annotated[
        str | None,
        typer.Option(metavar="i/N", help="Run this part of the windows only; then `merge`."),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read and run one decoder layer at a time, for models larger than memory.",
            show_default="if the weights do not fit the free memory",
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Stream, and keep layers' inputs there rather than in memory; after a kill the "
            "same command continues.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a model over text and sum up what the atoms of its experts do.

    One forward and one backward per window serve all methods. Processes started by `torchrun
    --nproc-per-node N --no-python atomic-moe calibrate …` share the windows, one device each.
    """
    from vllm_atomic_moe import api
    from vllm_atomic_moe.calibration.ranks import Ranks

    quiet_transformers()
    first = Ranks.here().rank == 0
    lines: list[str] = []
    with progress_bar("reading text and model", "calibrating", quiet=not first) as show:
        statistics = api.calibrate(
            model,
            data,
            output,
            field=field,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            seed=seed,
            gradients=gradients,
            shard=shard,
            stream=stream,
            scratch=scratch,
            trust_remote_code=trust_remote_code,
            on_progress=show,
            on_note=print_note,
            on_warning=lines.append,
        )
    if not first:
        return
    for line in lines:
        print_warning(line)
    report(output, statistics, as_json)


def report(output: Path, statistics: Any, as_json: bool) -> None:
    """Print what was calibrated, and which experts saw few tokens."""
    if as_json:
        print_json(describe(output, statistics))
    else:
        print_statistics(output, statistics)


def describe(file: Path, statistics: Any) -> dict[str, Any]:
    """What is said about a statistics file, as plain data."""
    from vllm_atomic_moe.calibration.findings import experts_with_few_tokens
    from vllm_atomic_moe.files.statistics import data_digest

    few = experts_with_few_tokens(statistics.sums)
    return {
        "file": str(file),
        "calibration": dict(statistics.calibration),
        "data": data_digest(statistics.calibration),
        "experts_with_few_tokens": [dataclasses.asdict(entry) for entry in few],
    }


def print_statistics(file: Path, statistics: Any) -> None:
    """The same as text, with a table of a few of the experts."""
    from vllm_atomic_moe.files.statistics import MIN_TOKENS

    few = describe(file, statistics)["experts_with_few_tokens"]
    typer.echo(
        f"{file}: {calibrated(statistics.calibration)}; "
        f"{len(statistics.sums)} layers of {statistics.model['num_experts']} experts of "
        f"{statistics.model['intermediate_size']} atoms"
    )
    if few:
        typer.echo(f"\nexperts with fewer than {MIN_TOKENS} tokens:")
        print_table(
            ["layer", "expert", "tokens"],
            [[str(x["layer"]), str(x["expert"]), str(x["tokens"])] for x in few[:SHOWN_EXPERTS]],
        )
        if len(few) > SHOWN_EXPERTS:
            typer.echo(f"… and {len(few) - SHOWN_EXPERTS} more; --json lists them all")
