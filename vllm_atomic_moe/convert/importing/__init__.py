"""Make profiles from other tools' pruning files; each file of `formats/` has one format.

This file adds the name and the metadata, and checks the profile as a server would. A reader turns a
file into masks for one checkpoint; its errors name the position in the file: a line, a key, an
index.

Legend: E experts, I full intermediate size, K experts per token.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from vllm_atomic_moe import __version__
from vllm_atomic_moe.convert.importing.importer import Importer
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.plain_files import check_not_pointer
from vllm_atomic_moe.files.profiles import DENSE, PruningProfile
from vllm_atomic_moe.files.registry import Registry, load_registry
from vllm_atomic_moe.files.tensors import shorten
from vllm_atomic_moe.scoring.budget import check_ratio

ENTRY_POINTS = "atomic_moe.importers"
IMPORTED = "imported"
NAME_LENGTH = 64


@functools.cache
def known_importers() -> Registry[Importer]:
    """Every format by name: ours, and those that installed packages register."""
    return load_registry("format", ENTRY_POINTS, f"{__name__}.formats", "IMPORTER", Importer)


def import_profile(
    format_name: str,
    path: Path,
    model: CheckpointInfo,
    *,
    ratio: float | None = None,
    name: str | None = None,
) -> tuple[PruningProfile, list[str]]:
    """Read another tool's file as a profile for `model`; writes nothing.

    Args:
        format_name: a key of `known_importers().entries`.
        path: the file.
        model: the checkpoint the profile is for.
        ratio: fraction to remove, 0 <= ratio < 1, for formats that rank; None for the others.
        name: of the profile; made from the file's name (and the ratio) if None.

    Returns:
        The profile, which fits the checkpoint, and warnings, one line each.

    Raises:
        ValueError: the format is not known, the ratio does not go with it, no name can be made, or
            the file is refused.
    """
    kind = known_importers().find(format_name)
    _check_ratio(format_name, kind, ratio)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    check_not_pointer(path)
    name = name or _default_name(path, ratio)
    masks = kind.read(path, model, ratio) if kind.needs_ratio else kind.read(path, model)
    profile = PruningProfile(name, masks.keep, masks.routable)
    source = {"format": format_name, "file": path.name, "sha256": _sha256(path)}
    if package := known_importers().packages.get(format_name):
        source["package"] = package
    metadata = {
        "method": IMPORTED,
        **masks.metadata,
        "kept": str(profile.kept),
        "model": json.dumps(model.identity()),
        "source": json.dumps(source),
        "created_by": f"vllm-atomic-moe {__version__}",
    }
    if ratio is not None:
        metadata["ratio"] = str(ratio)
    profile = replace(profile, metadata=metadata)
    try:
        warnings = profile.check(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return profile, [*masks.warnings, *warnings]


def _check_ratio(format_name: str, kind: Importer, ratio: float | None) -> None:
    if kind.needs_ratio and ratio is None:
        raise ValueError(
            f"format {format_name!r} ranks and does not say how much goes; "
            "give --ratio, the fraction to remove"
        )
    if not kind.needs_ratio and ratio is not None:
        raise ValueError(
            f"format {format_name!r} carries its own selection, --ratio {ratio} changes nothing; "
            "leave it out"
        )
    if ratio is not None:
        check_ratio(ratio)


def _default_name(path: Path, ratio: float | None) -> str:
    """The file's stem as a lawful profile name; with the percentage, if a ratio was given."""
    percent = "" if ratio is None else f"-{float(Fraction(str(ratio)) * 100):g}"
    stem = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).lstrip("._-")
    stem = stem[: NAME_LENGTH - len(percent)].rstrip("-")
    if not stem or stem + percent == DENSE:
        raise ValueError(
            f"{path.name}: no profile name can be made of {shorten(path.stem)}; give --name NAME"
        )
    return stem + percent


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
