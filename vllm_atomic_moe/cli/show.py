"""atomic-moe show: what a profile keeps, as a table and as a picture; what statistics are of."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_atomic_moe.cli.calibrate import describe as describe_statistics
from vllm_atomic_moe.cli.calibrate import print_statistics
from vllm_atomic_moe.cli.console import (
    check_plot,
    draw,
    print_error,
    print_json,
    print_table,
)
from vllm_atomic_moe.cli.profiles import (
    PROFILES_HELP,
    calibrated,
    profile_files,
    summarize_widths,
)
from vllm_atomic_moe.files.layouts import atom_bytes

# A profile does not tell the dtype in which it is served; for most models that has 16 bits.
BYTES_PER_WEIGHT = 2


def show(
    profiles: Annotated[
        list[str],
        typer.Argument(metavar="PROFILE...", help=f"{PROFILES_HELP} Or statistics files."),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the kept widths, layers x experts, all profiles on one scale "
            "(.png, .pdf or .svg).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what profiles keep: widths per layer, and the bytes that saves at 16 bits a weight.

    Of a statistics file, what it was calibrated on; two of the same windows have the same digest.

    Exit code 1 if a file is unreadable (each is one line on stderr) or the picture was not drawn.
    """
    if plot is not None:
        check_plot(plot)
    from vllm_atomic_moe.files.profiles import PruningProfile
    from vllm_atomic_moe.files.statistics import Statistics, is_statistics

    statistics: list[tuple[Path, Any]] = []
    read: list[tuple[Path, PruningProfile]] = []
    described: list[dict[str, Any]] = []
    left_out: list[ValueError] = []
    for file in profile_files(profiles):
        try:
            if is_statistics(file):
                statistics.append((file, Statistics.read(file)))
                continue
            profile = PruningProfile.read(file)
            described.append(_describe(file, profile))
            read.append((file, profile))
        except ValueError as error:
            left_out.append(error)
    if not read and not statistics:
        raise left_out[0]
    if plot is not None and not read:
        raise ValueError("--plot draws profiles, and only statistics are named; leave it out")
    drawn = True
    if plot is not None:
        from vllm_atomic_moe.measure.plots import plot_widths

        # Before anything is printed: a reader such as `head` may end the command early.
        shown = [profile for _, profile in read]
        drawn = draw(plot, lambda: plot_widths(shown, plot), quiet=True)
    if as_json:
        told = [describe_statistics(file, of_file) for file, of_file in statistics]
        print_json({"profiles": described, **({"statistics": told} if told else {})})
    else:
        for index, description in enumerate(described):
            if index:
                typer.echo()
            _print(description)
        for index, (file, of_file) in enumerate(statistics):
            if index or described:
                typer.echo()
            print_statistics(file, of_file)
    if plot is not None and drawn and not as_json:
        typer.echo(f"\nwrote {plot}")
    for reason in left_out:
        print_error(f"left out: {reason}")
    if left_out or not drawn:
        raise typer.Exit(1)


def _describe(file: Path, profile: Any) -> dict[str, Any]:
    """Everything `show` says about one profile, as plain data."""
    from vllm_atomic_moe.files.statistics import data_digest

    model = profile.model or {}
    hidden_size = model.get("hidden_size")
    if type(hidden_size) is not int:
        hidden_size = None
    rows = [_describe_layers(profile, [layer], hidden_size) for layer in profile.keep]
    calibration = _calibration(profile)
    return {
        "name": profile.name,
        "file": str(file),
        "method": profile.metadata.get("method"),
        "ratio": profile.metadata.get("ratio"),
        "calibration": calibration,
        "data": data_digest(calibration or {}),
        "compensated_layers": len(profile.compensation),
        "bias_bytes_16bit": BYTES_PER_WEIGHT
        * sum(it.bias_EH.numel() for it in profile.compensation.values()),
        "layers": [{"layer": layer, **row} for layer, row in zip(profile.keep, rows, strict=True)],
        "all": _describe_layers(profile, list(profile.keep), hidden_size),
    }


def _calibration(profile: Any) -> dict[str, Any] | None:
    """What the profile says of its calibration; None if it says nothing, or nothing of ours."""
    with suppress(KeyError, ValueError):
        told = json.loads(profile.metadata["calibration"])
        if isinstance(told, dict) and isinstance(told.get("domains"), list) and "tokens" in told:
            return told
    return None


def _describe_layers(profile: Any, layers: list[int], hidden_size: int | None) -> dict[str, Any]:
    masks = [profile.keep[layer] for layer in layers]
    atoms = sum(mask.numel() for mask in masks)
    kept = sum(int(mask.sum()) for mask in masks)
    saved = atoms - kept
    experts = sum(mask.shape[0] for mask in masks)
    excluded = sum(
        int((~profile.routable[layer]).sum()) for layer in layers if layer in profile.routable
    )
    return {
        "experts": experts,
        "widths": summarize_widths(width for layer in layers for width in profile.widths(layer)),
        "routable_experts": experts - excluded,
        "atoms": atoms,
        "kept_atoms": kept,
        "kept": kept / atoms,
        "bytes_saved_16bit": (
            None if hidden_size is None else saved * atom_bytes(hidden_size, BYTES_PER_WEIGHT)
        ),
    }


def _print(description: dict[str, Any]) -> None:
    notes = [f"{key} {description[key]}" for key in ("method", "ratio") if description[key]]
    notes.append(f"{description['all']['kept']:.2%} of atoms kept")
    saved = description["all"]["bytes_saved_16bit"]
    if saved is not None:
        notes.append(f"{saved / 2**20:.2f} MiB saved at 16 bits a weight")
    if description["compensated_layers"]:
        notes.append(f"compensated by {description['bias_bytes_16bit'] / 2**20:.2f} MiB of biases")
    typer.echo(f"{description['name']}: {', '.join(notes)}")
    if description["calibration"]:
        typer.echo(f"calibrated on {calibrated(description['calibration'])}")
    # The column says nothing if the profile does not mask routing.
    routing = description["all"]["routable_experts"] < description["all"]["experts"]
    # Short words: with all columns the table fits a terminal of 80.
    columns = ["layer", "width min", "median", "max", "zero width"]
    columns += [*(["routable"] if routing else []), "kept", "MiB saved"]
    labelled = [(str(row["layer"]), row) for row in description["layers"]]
    print_table(
        columns,
        [_row(label, row, routing) for label, row in [*labelled, ("all", description["all"])]],
    )


def _row(label: str, row: dict[str, Any], routing: bool) -> list[str]:
    saved = row["bytes_saved_16bit"]
    return [
        label,
        *map(str, row["widths"].values()),
        *([f"{row['routable_experts']}/{row['experts']}"] if routing else []),
        f"{row['kept']:.2%}",
        "-" if saved is None else f"{saved / 2**20:.2f}",
    ]
