"""Shared by the subcommands about profile files: finding and describing them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from vllm_atomic_moe.cli.console import print_json, print_table

PROFILES_HELP = (
    "Profile files, directories of them, or Hub repositories, as in org/name@revision/folder."
)
WIDTH_COLUMNS = ["width min", "median", "max", "zero-width experts"]


def profile_files(profiles: list[str]) -> list[Path]:
    """The files named, directories and Hub repositories replaced by their files; each file once.

    Raises:
        ValueError: a path does not exist, a directory holds no profile, or two files of one
            directory carry one name.
    """
    from vllm_atomic_moe.files.hub import resolve_profiles
    from vllm_atomic_moe.files.profiles import ProfileStore

    files: list[Path] = []
    for path in map(resolve_profiles, profiles):
        if not path.exists():
            raise ValueError(f"profile {path} does not exist; name a file or a directory of them")
        if not path.is_dir():
            files.append(path)
            continue
        store = ProfileStore(path)
        found = sorted([*store.paths.values(), *store.invalid])
        if not found:
            raise ValueError(
                f"directory {path} holds no *.safetensors profile; "
                "make profiles with `atomic-moe prune`"
            )
        files += found
    return list({file.resolve(): file for file in files}.values())


def print_written(profile: Any, output: Path, as_json: bool, **more: Any) -> None:
    """Describe a profile that was just written into the directory `output`.

    Args:
        profile: a `PruningProfile`.
        output: the directory.
        as_json: print JSON instead of a table.
        more: further entries of the JSON.
    """
    path = output / f"{profile.name}.safetensors"
    widths = summarize_widths(width for layer in profile.keep for width in profile.widths(layer))
    excluded = sum(int((~routable).sum()) for routable in profile.routable.values())
    if as_json:
        print_json(
            {
                "name": profile.name,
                "file": str(path),
                "method": profile.metadata["method"],
                **more,
                "kept": profile.kept,
                "kept_atoms": profile.kept_atoms,
                "widths": widths,
                "excluded_from_routing": excluded,
            }
        )
        return
    print_table(
        ["profile", "kept", *WIDTH_COLUMNS, "not routable"],
        [[profile.name, f"{profile.kept:.2%}", *map(str, widths.values()), str(excluded)]],
    )
    typer.echo(f"wrote {path}")


def calibrated(calibration: Mapping[str, Any]) -> str:
    """What was calibrated on, in words: tokens, domains, settings and the digest of the windows."""
    from vllm_atomic_moe.files.statistics import data_digest

    domains = ", ".join(map(str, calibration["domains"]))
    parts = [f"{calibration['tokens']} tokens", f"domains {domains}"]
    for key, words in (
        ("seq_len", "windows of {}"),
        ("samples", "at most {} a domain"),
        ("seed", "seed {}"),
    ):
        if key in calibration:
            parts.append(words.format(calibration[key]))
    if digest := data_digest(calibration):
        parts.append(f"data {digest}")
    if isinstance(shards := calibration.get("shards"), dict):
        parts.append(f"shards {shards.get('here')} of {shards.get('of')}")
    return ", ".join(parts)


def summarize_widths(widths: Iterable[Any]) -> dict[str, float]:
    """Smallest, median and largest of `widths`, and how many are zero."""
    ordered = sorted(int(width) for width in widths)
    median = statistics.median(ordered)
    return {
        "min": ordered[0],
        "median": int(median) if median == int(median) else median,
        "max": ordered[-1],
        "zero_width_experts": ordered.count(0),
    }
