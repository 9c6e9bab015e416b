"""What the subcommands about profile files share: finding the files, describing the widths."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WIDTH_COLUMNS = ["width min", "median", "max", "zero-width experts"]


def profile_files(profiles: list[Path]) -> list[Path]:
    """The files named, directories replaced by the profile files in them; each file once.

    Raises:
        ValueError: a path does not exist, a directory holds no profile, or two files of one
            directory carry one name.
    """
    from vllm_atomic_moe.profiles import ProfileStore

    files: list[Path] = []
    for path in profiles:
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


def describe_widths(profile: Any) -> dict[str, float]:
    """Smallest, median and largest width over all experts of all layers, and how many have none."""
    return summarise_widths(width for layer in profile.keep for width in profile.widths(layer))


def summarise_widths(widths: Iterable[Any]) -> dict[str, float]:
    """Smallest, median and largest of `widths`, and how many are zero."""
    ordered = sorted(int(width) for width in widths)
    median = statistics.median(ordered)
    return {
        "min": ordered[0],
        "median": int(median) if median == int(median) else median,
        "max": ordered[-1],
        "zero_width_experts": ordered.count(0),
    }
