"""atomic-moe eval: perplexity per domain and profile, and agreement with dense, as served."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_atomic_moe.cli.console import (
    check_plot,
    draw,
    measured,
    print_json,
    print_table,
    quiet_vllm,
    status_lines,
)
from vllm_atomic_moe.cli.options import (
    Field,
    HeldOut,
    Model,
    ServedDtype,
    TrustRemoteCode,
    Windows,
    WindowTokens,
)


def evaluate(
    model: Model,
    data: HeldOut,
    profiles: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|REPO",
            help="Directory of profiles, or a Hub repository, as in org/name@revision/folder.",
            show_default="MODEL/atomic_profiles",
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", help="Measure this profile; repeat.", show_default="all"),
    ] = None,
    seq_len: WindowTokens = None,
    field: Field = None,
    samples: Windows = 128,
    dtype: ServedDtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw perplexity over kept atoms, a line per method (.png, .pdf or .svg).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity with vLLM: dense first, then every profile, on the same text.

    It also reports the KL divergence of each from dense, and the share of equal greedy answers. All
    profiles are checked before the first engine starts.
    """
    if plot is not None:
        check_plot(plot)
    quiet_vllm()
    from vllm_atomic_moe import api

    rows, failure = measured(
        lambda: api.evaluate(
            model,
            data,
            profiles=profiles,
            profile=profile,
            seq_len=seq_len,
            samples=samples,
            dtype=dtype,
            field=field,
            trust_remote_code=trust_remote_code,
            on_progress=status_lines(),
        )
    )
    if as_json:
        told = [{**dataclasses.asdict(row), "delta": _delta(row, rows[0])} for row in rows]
        for row in told:
            del row["windows"]
        print_json(told)
    else:
        _print(rows)
    if plot is not None:
        from vllm_atomic_moe.measure.plots import perplexity_points, plot_perplexity

        points = perplexity_points([dataclasses.asdict(row) for row in rows])
        draw(plot, lambda: plot_perplexity(points, plot), quiet=as_json)
    if failure:
        raise failure


def _print(rows: Sequence[Any]) -> None:
    """Print the table, and with several domains a second one of changes against dense."""
    dense = rows[0]
    print_table(
        ["profile", "kept", "MiB", "answers", "KL", "Δ all", *dense.perplexity],
        [
            [
                row.profile,
                f"{row.kept:.1%}",
                f"{row.kept_bytes / 2**20:.2f}",
                f"{row.answers.equal:.0%}",
                f"{row.kl['all']:.4f}",
                f"{_delta(row, dense)['all']:+.1%}",
                *(f"{value:.2f}" for value in row.perplexity.values()),
            ]
            for row in rows
        ],
    )
    if len(dense.perplexity) > 2 and len(rows) > 1:
        typer.echo()
        print_table(
            ["against dense", *dense.perplexity],
            [
                [row.profile, *(f"{value:+.1%}" for value in _delta(row, dense).values())]
                for row in rows[1:]
            ],
        )
    typer.echo(
        f"\nanswers: share of {dense.answers.prompts} greedy answers of {dense.answers.tokens} "
        "tokens that equal dense's\n"
        "KL: divergence from dense in nats per token, over the tokens that both models report"
    )


def _delta(row: Any, dense: Any) -> dict[str, float]:
    """Domain -> relative change of perplexity, 0.1 for ten percent more than dense."""
    return {
        domain: value / dense.perplexity[domain] - 1 for domain, value in row.perplexity.items()
    }
