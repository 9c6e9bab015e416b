"""atomic-moe bench: layers, or whole servers, pruned beside vLLM's own dense ones."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_atomic_moe.cli.console import check_plot, print_json, print_table, status_lines


def bench(
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
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds per cell at most.")] = 30,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="After this time three rounds are enough.")
    ] = 3.0,
    kernel: Annotated[
        str | None, typer.Option(help="Our kernel.", show_default="the fastest that runs")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of weights, widths and routings.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the ratios (.png, .pdf or .svg)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure experts of any width beside vLLM's own dense op, in one run.

    The ratio is time ÷ (dense time × mean kept width over the routed rows ÷ full width): 1 for a
    kernel as fast as the atoms that are left.
    """
    if plot is not None:
        check_plot(plot)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch

    from vllm_atomic_moe.serving.layer_benchmark import SHAPES, LayerPlan, measure_layers

    defaults = LayerPlan()
    plan = LayerPlan(
        shapes=[_named(name, SHAPES, "shape") for name in shape or SHAPES],
        tokens=tokens or defaults.tokens,
        pruned=pruned or defaults.pruned,
        dtype=_named(
            dtype,
            {str(t)[6:]: t for t in (torch.bfloat16, torch.float16, torch.float32)},
            "dtype",
        ),
        rounds=rounds,
        seconds=seconds,
        kernel=kernel,
        device=device,
        seed=seed,
    )
    report = measure_layers(plan, status_lines())
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report)
    if plot is not None:
        from vllm_atomic_moe.plots import LayerPoint, plot_layers

        points = [
            LayerPoint(c.shape, c.tokens, c.pruned, c.ratio, c.ratio_low, c.ratio_high)
            for c in report.cells
            if (c.routing, c.spread) == ("random", "spread")
        ]
        plot_layers(points, plot)
        if not as_json:
            typer.echo(f"\nwrote {plot}")


def _named(name: str, choices: dict[str, Any], what: str) -> Any:
    if name not in choices:
        raise ValueError(f"{what} {name!r} is unknown; wanted one of {', '.join(choices)}")
    return choices[name]


def _print(report: Any) -> None:
    typer.echo(f"{report.device}, {report.threads} threads")
    typer.echo(f"dense: vLLM's {report.dense}; ours: {report.kernel}")
    typer.echo(
        f"ceilings: copy {report.copy_bytes_per_s / 1e9:.1f} GB/s (read and write), "
        f"matmul {report.matmul_flop_per_s / 1e9:.0f} GFLOP/s\n"
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
                f"{cell.uniform_ms:.2f} ms",
                f"{cell.ratio:.2f}",
                f"{cell.ratio_low:.2f}–{cell.ratio_high:.2f}",
                f"{cell.uniform_ratio:.2f}",
                f"{cell.bytes_per_s / 1e9:.1f}",
                f"{cell.flop_per_s / 1e9:.0f}",
            ]
            for cell in report.cells
        ],
    )
