"""atomic-moe bench: layers, servers or calibration, each against its baseline."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_atomic_moe.cli.console import (
    check_plot,
    draw,
    measured,
    print_json,
    print_table,
    status_lines,
)
from vllm_atomic_moe.cli.options import TrustRemoteCode

# What is measured -> its options.
OPTIONS = {
    "layers": ("shape", "tokens", "pruned", "dtype", "rounds", "seconds", "kernel", "plot"),
    "servers": ("profiles", "profile", "serve", "rounds", "trust_remote_code", "plot"),
    "calibration": ("windows", "seq_len", "dtype", "rounds", "trust_remote_code"),
}
DTYPES = ("bfloat16", "float16", "float32")


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Local directory or Hugging Face id, to serve."),
    ] = None,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic",
            help="As MODEL, a random one with profiles that prune 25 and 50 %, made for this run: "
            "1.1 GiB of experts, in the temporary directory.",
        ),
    ] = False,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Calibrate MODEL instead of serving it.")
    ] = False,
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
        str | None,
        typer.Option(metavar="FLAGS", help="More flags for every `vllm serve`, in one string."),
    ] = None,
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
        typer.Option(help=", ".join(DTYPES), show_default="bfloat16"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rounds of layers at most, of servers, of calibrations.",
            show_default="30; 1; 3",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="After this time three rounds are enough.", show_default="3"),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Windows of a calibration.", show_default="8"),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window of a calibration.", show_default="512"),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Our kernel.", show_default="the fastest that runs")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random except --synthetic.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the ratios (.png, .pdf or .svg)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure pruned against dense, in one run: layers, or with MODEL whole servers.

    Layers: the ratio is time ÷ (time of vLLM's dense op × mean kept width over the routed rows ÷
    full width), 1 for a kernel as fast as the remaining atoms; then other rows (fp8, int4, mxfp4)
    and activations against plain rows and SiLU of the same atoms. Options: --shape, --tokens,
    --pruned, --dtype, --rounds, --seconds, --kernel, --plot.

    Servers: vLLM's default loader dense, then every profile, one server after another under vLLM's
    load generator; throughput and latency, whole load from a warm page cache, memory, and changes
    between the profiles. Options: --profiles, --profile, --serve, --rounds, --plot,
    --trust-remote-code.

    Calibration: `atomic-moe calibrate`, in memory and layer by layer, against the HEAPr paper's
    two forward passes; time without reading weights, and memory beyond the weights that are held
    throughout. Options: --windows, --seq-len, --dtype, --rounds, --trust-remote-code.
    """
    if plot is not None:
        check_plot(plot)
    if model is not None and synthetic:
        raise ValueError("--synthetic replaces MODEL; leave one of them out")
    given = {
        "profiles": profiles,
        "profile": profile,
        "serve": serve,
        "shape": shape,
        "tokens": tokens,
        "pruned": pruned,
        "dtype": dtype,
        "rounds": rounds,
        "seconds": seconds,
        "kernel": kernel,
        "windows": windows,
        "seq_len": seq_len,
        "trust_remote_code": trust_remote_code or None,
        "plot": plot,
    }
    options = {name: value for name, value in given.items() if value not in (None, [])}
    named = model is not None or synthetic
    what = "calibration" if calibration else "servers" if named else "layers"
    _check_options(what, options)
    if calibration and not named:
        raise ValueError("--calibration needs a MODEL, or --synthetic")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if what == "layers":
        _bench_layers(options, seed, as_json)
        return
    with _directory(model) as directory:
        run = _bench_calibration if calibration else _bench_servers
        run(directory, options, seed, as_json)


def _check_options(what: str, given: Mapping[str, Any]) -> None:
    foreign = [f"--{name.replace('_', '-')}" for name in given if name not in OPTIONS[what]]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} does not apply to {what}; MODEL measures servers, MODEL "
            "--calibration measures calibration, neither of them measures layers"
        )
    if given.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"dtype {given['dtype']!r} is unknown; wanted one of {', '.join(DTYPES)}")


@contextmanager
def _directory(model: str | None) -> Iterator[Path]:
    """The checkpoint's directory: of `model`, or of a synthetic one."""
    if model is not None:
        from vllm_atomic_moe.files.checkpoint import resolve_model

        yield resolve_model(model)
        return
    from vllm_atomic_moe.measure.synthetic import make_checkpoint

    with tempfile.TemporaryDirectory(prefix="atomic-moe-", ignore_cleanup_errors=True) as parent:
        directory = Path(parent, "synthetic")
        make_checkpoint(directory)
        yield directory


def _bench_layers(options: dict[str, Any], seed: int, as_json: bool) -> None:
    import torch

    from vllm_atomic_moe.measure.instruction_set import hide_wider_instructions

    hide_wider_instructions()
    from vllm_atomic_moe.measure.layer_benchmark import SHAPES, LayerPlan, measure_layers
    from vllm_atomic_moe.measure.variant_benchmark import measure_variants

    plot = options.pop("plot", None)
    if "shape" in options:
        options["shapes"] = [_shape(name, SHAPES) for name in options.pop("shape")]
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    plan = LayerPlan(seed=seed, **options)
    report = measure_layers(plan, status_lines())
    if not as_json:
        _print(report)
    variants = measure_variants(plan, status_lines())
    if as_json:
        print_json({**dataclasses.asdict(report), "variants": [*map(dataclasses.asdict, variants)]})
    else:
        _print_variants(variants)
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
        draw(plot, lambda: plot_layers(points, plot), quiet=as_json)


def _bench_servers(directory: Path, options: dict[str, Any], seed: int, as_json: bool) -> None:
    from vllm_atomic_moe.calibration.model import check_model_code
    from vllm_atomic_moe.measure.server_benchmark import measure_servers
    from vllm_atomic_moe.measure.server_report import ServerPlan

    plot = options.get("plot")
    serve = shlex.split(options.get("serve", ""))
    if "trust_remote_code" in options:
        serve.append("--trust-remote-code")
    check_model_code(directory, "--trust-remote-code" in serve)
    report, failure = measured(
        lambda: measure_servers(
            directory,
            options.get("profiles", directory / "atomic_profiles"),
            names=options.get("profile", ()),
            rounds=options.get("rounds", 1),
            plan=ServerPlan(seed=seed),
            serve_arguments=serve,
            progress=status_lines(),
        )
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
        draw(plot, lambda: plot_servers(points, plot), quiet=as_json)
    if failure:
        raise failure


def _print_servers(report: Any) -> None:
    """Two tables, of loading and of every phase; and a line about changes."""
    rows = report.profiles
    columns = "profile kept experts load ratio start peak loaded freed KV-cache gained"
    print_table(
        columns.split(),
        [
            [
                row.profile,
                f"{row.kept:.1%}",
                _mib(row.resident_bytes),
                f"{row.load_s.median:.2f} s",
                f"{row.load_ratio:.2f}",
                f"{row.start_s.median:.1f} s",
                _mib(row.peak_bytes),
                _mib(row.rest_bytes),
                "" if row.freed is None else f"{row.freed:.1%}",
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
    if (changes := report.changes) is not None:
        typer.echo(
            f"\nchange of the active profile, {len(changes.profiles)} loaded, "
            f"{_mib(changes.resident_bytes)}: {changes.change_ms.median:.2f} ms "
            f"(slowest {changes.change_ms.highest:.2f})"
        )


def _bench_calibration(directory: Path, options: dict[str, Any], seed: int, as_json: bool) -> None:
    from vllm_atomic_moe.measure.calibration_benchmark import CalibrationPlan, measure_calibration

    plan = CalibrationPlan(seed=seed, **options)
    report = measure_calibration(directory, plan, status_lines())
    if as_json:
        print_json(report.to_json())
        return
    print_table(
        [
            *("way", "seconds", "lowest", "highest", "of two forwards", "reading"),
            *("weights", "statistics", "peak"),
        ],
        [
            [
                row.way,
                f"{row.seconds.median:.2f}",
                f"{row.seconds.lowest:.2f}",
                f"{row.seconds.highest:.2f}",
                f"{row.ratio:.2f}",
                f"{row.reading_s:.2f}",
                _mib(row.weight_bytes),
                _mib(row.state_bytes),
                _mib(row.peak_bytes),
            ]
            for row in report.ways
        ],
    )


def _shape(name: str, shapes: Mapping[str, Any]) -> Any:
    if name not in shapes:
        raise ValueError(f"shape {name!r} is unknown; wanted one of {', '.join(shapes)}")
    return shapes[name]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


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
    typer.echo("\nfour profiles in one batch, against the union of their atoms under one:\n")
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


def _print_variants(cells: Sequence[Any]) -> None:
    typer.echo("\nother rows and activations, against plain rows and SiLU of the same atoms:\n")
    print_table(
        ["layer", "T", "pruned", "variant", "bytes", "plain", "ours", "ratio", "quartiles"],
        [
            [
                cell.shape,
                str(cell.tokens),
                f"{cell.pruned:.0%}",
                cell.variant,
                f"{cell.size:.2f}",
                f"{cell.plain_ms:.2f} ms",
                f"{cell.ours_ms:.2f} ms",
                _number(cell.ratio),
                f"{_number(cell.ratio_low)}–{_number(cell.ratio_high)}",
            ]
            for cell in cells
        ],
    )
