"""atomic-moe merge: statistics of shards -> statistics of the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_atomic_moe.cli.calibrate import report
from vllm_atomic_moe.files.plain_files import check_output


def merge(
    statistics: Annotated[
        list[Path],
        typer.Argument(metavar="STATS...", help="Files made by `calibrate --shard i/N`."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Statistics file to write (or replace).")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Add the statistics of shards of one calibration; the result equals one run over all."""
    check_output(output)
    from vllm_atomic_moe.files.statistics import Statistics
    from vllm_atomic_moe.files.statistics import merge as add

    merged = add([Statistics.read(path) for path in statistics])
    merged.write(output)
    report(output, merged, as_json)
