"""atomic-moe bench: layers, or whole servers, pruned beside vLLM's own dense ones."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_atomic_moe.cli.console import check_plot, print_json, print_table, status_lines


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Local directory or Hugging Face id, to serve."),
    ] = None,
    profiles: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Directory of profiles.", show_default="MODEL/atomic_profiles"
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", help="Serve this profile; repeat.", show_default="all"),
    ] = None,
    serve: Annotated[
        str,
        typer.Option(metavar="FLAGS", help="More flags for every `vllm serve`, in one string."),
    ] = "",
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Measure this layer; repeat.", show_default="all five"),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens per call; repeat.", show_default="1 8 64 512 2048"),
    ] = None,
    pruned: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=0.99,
            help="Fraction of atoms removed; repeat.",
            show_default="0 0.25 0.5 0.75",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32.", show_default="bfloat16"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a layer's timings, at most; of servers started in turn.",
            show_default="30; 1",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="After this time three rounds are enough.", show_default="3"),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Our kernel.", show_default="the fastest that runs")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, widths and routings.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the ratios (.png, .pdf or .svg)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure pruned beside dense, in one run: layers, or with MODEL whole servers.

    Layers: the ratio is time ÷ (time of vLLM's dense op × mean kept width over the routed rows ÷
    full width), 1 for a kernel as fast as the atoms that are left. Options: --shape, --tokens,
    --pruned, --dtype, --seconds, --kernel.

    Servers: vLLM's default loader dense, then every profile, one server after another under vLLM's
    load generator; throughput and latency, load time, memory. Options: --profiles, --profile,
    --serve.
    """
    if plot is not None:
        check_plot(plot)
    given = {
        "shapes": shape,
        "tokens": tokens,
        "pruned": pruned,
        "dtype": dtype,
        "seconds": seconds,
        "kernel": kernel,
    }
    layer_options = {name: value for name, value in given.items() if value is not None}
    if model is None and (profiles or profile or serve):
        raise ValueError("--profiles, --profile and --serve measure servers; name the MODEL")
    if model is not None and layer_options:
        raise ValueError(
            "--shape, --tokens, --pruned, --dtype, --seconds and --kernel measure layers; leave "
            "MODEL or them out"
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if model is not None:
        _bench_servers(model, profiles, profile or [], rounds or 1, serve, seed, plot, as_json)
    else:
        if rounds is not None:
            layer_options["rounds"] = rounds
        _bench_layers(layer_options, seed, plot, as_json)


def _bench_layers(options: dict[str, Any], seed: int, plot: Path | None, as_json: bool) -> None:
    """Options: those of `LayerPlan` that were given, shapes and dtype by name."""
    import torch

    from vllm_atomic_moe.measure.instruction_set import hide_wider_instructions

    hide_wider_instructions()
    from vllm_atomic_moe.measure.layer_benchmark import SHAPES, LayerPlan, measure_layers

    if "shapes" in options:
        options["shapes"] = [_named(name, SHAPES, "shape") for name in options["shapes"]]
    if "dtype" in options:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        by_name = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
        options["dtype"] = _named(options["dtype"], by_name, "dtype")
    report = measure_layers(LayerPlan(seed=seed, **options), status_lines())
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report)
    if plot is not None:
        from vllm_atomic_moe.measure.plots import LayerPoint, plot_layers

        points = [
            LayerPoint(c.shape, c.tokens, c.pruned, c.ratio, c.ratio_low, c.ratio_high)
            for c in report.cells
            if (c.routing, c.spread) == ("random", "spread")
            and c.ratio is not None
            and c.ratio_low is not None
            and c.ratio_high is not None
        ]
        plot_layers(points, plot)
        if not as_json:
            typer.echo(f"\nwrote {plot}")


def _bench_servers(
    model: str,
    profiles: Path | None,
    names: list[str],
    rounds: int,
    serve: str,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    from vllm_atomic_moe.files.checkpoint import resolve_model
    from vllm_atomic_moe.measure.server_benchmark import measure_servers
    from vllm_atomic_moe.measure.server_report import LoadPlan

    directory = resolve_model(model)
    report = measure_servers(
        directory,
        profiles or directory / "atomic_profiles",
        names=names,
        rounds=rounds,
        load=LoadPlan(seed=seed),
        serve_arguments=shlex.split(serve),
        progress=status_lines(),
    )
    if as_json:
        print_json(report.to_json())
    else:
        _print_servers(report)
    if plot is not None:
        from vllm_atomic_moe.measure.plots import ServerPoint, plot_servers

        points = [
            ServerPoint(row.profile, row.kept, phase.phase, phase.ratio)
            for row in report.profiles
            for phase in row.phases
        ]
        plot_servers(points, plot)
        if not as_json:
            typer.echo(f"\nwrote {plot}")


def _print_servers(report: Any) -> None:
    """Two tables: what loading gives, then every phase."""
    rows = report.profiles
    print_table(
        ["profile", "kept", "experts", "load", "start", "anonymous", "KV-cache", "gained"],
        [
            [
                row.profile,
                f"{row.kept:.1%}",
                f"{row.resident_bytes / 2**20:.1f} MiB",
                f"{row.load_s.median:.2f} s",
                f"{row.start_s.median:.1f} s",
                f"{row.rest_bytes / 2**20:.0f} MiB",
                "" if row.kv_tokens is None else f"{row.kv_tokens} tokens",
                "" if row.kv_tokens_gained is None else f"{row.kv_tokens_gained:+d}",
            ]
            for row in rows
        ],
    )
    typer.echo()
    print_table(
        ["phase", "profile", "requests/s", "tokens/s", "TTFT", "TPOT", "of dense", "1/kept"],
        [
            [
                phase.phase,
                row.profile,
                f"{phase.requests_per_s.median:.2f}",
                f"{phase.total_tokens_per_s.median:.1f}",
                f"{phase.ttft_ms.median:.0f} ms",
                "" if phase.tpot_ms is None else f"{phase.tpot_ms.median:.1f} ms",
                f"{phase.ratio:.2f}",
                "" if row.bound is None else f"{row.bound:.2f}",
            ]
            for index in range(len(rows[0].phases))
            for row in rows
            for phase in [row.phases[index]]
        ],
    )


def _named(name: str, choices: dict[str, Any], what: str) -> Any:
    if name not in choices:
        raise ValueError(f"{what} {name!r} is unknown; wanted one of {', '.join(choices)}")
    return choices[name]


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _print(report: Any) -> None:
    typer.echo(f"{report.device}, {report.threads} threads")
    typer.echo(f"dense: vLLM's {report.dense}; ours: {report.kernel}")
    typer.echo(
        f"ceilings: reading {report.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"sgemm {report.sgemm_flop_per_s / 1e9:.0f} GFLOP/s\n"
    )
    columns = "layer T pruned routing widths kept dense ours uniform ratio quartiles uniform GB/s"
    print_table(
        [*columns.split(), "GFLOP/s"],
        [
            [
                cell.shape,
                str(cell.tokens),
                f"{cell.pruned:.0%}",
                cell.routing,
                cell.spread,
                f"{cell.kept:.2f}",
                f"{cell.dense_ms:.2f} ms",
                f"{cell.ours_ms:.2f} ms",
                _number(cell.uniform_ms, " ms"),
                _number(cell.ratio),
                f"{_number(cell.ratio_low)}–{_number(cell.ratio_high)}",
                _number(cell.uniform_ratio),
                f"{cell.bytes_per_s / 1e9:.1f}",
                f"{cell.flop_per_s / 1e9:.0f}",
            ]
            for cell in report.cells
        ],
    )
    if not report.mixes:
        return
    typer.echo("\nfour profiles in one batch, beside the union of their atoms under one:\n")
    print_table(
        ["layer", "T", "pruned", "union", "one", "four", "ratio", "quartiles"],
        [
            [
                mix.shape,
                str(mix.tokens),
                f"{mix.pruned:.0%}",
                f"{mix.union:.2f}",
                f"{mix.union_ms:.2f} ms",
                f"{mix.mixed_ms:.2f} ms",
                _number(mix.ratio),
                f"{_number(mix.ratio_low)}–{_number(mix.ratio_high)}",
            ]
            for mix in report.mixes
        ],
    )
