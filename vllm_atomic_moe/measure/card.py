"""The card of a repository of profiles: their model, how they were made, what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.plain_files import check_output, one_line
from vllm_atomic_moe.files.profiles import DENSE, ProfileStore, PruningProfile
from vllm_atomic_moe.files.tensors import replaced_file, shorten
from vllm_atomic_moe.measure.plots import perplexity_points, plot_perplexity, plot_widths

CARD, WIDTHS, PERPLEXITY = "README.md", "widths.png", "perplexity.png"
MADE_BY = "<!-- Written by `atomic-moe card`, which replaces all of it. -->"
TAGS = ("vllm-atomic-moe", "mixture-of-experts", "pruning")
KEYS = {"profile": str, "method": str, "settings": str, "kept": float, "perplexity": dict}


def write_card(model: str, directory: Path, measured: Path | None) -> Path:
    """Write README.md and its pictures beside the profiles of a directory.

    Args:
        model: Hugging Face id of their model.
        directory: the profiles.
        measured: the output of `atomic-moe eval --json` for them; None leaves perplexities out.

    Returns:
        The card.

    Raises:
        ValueError: the id is malformed, profiles are missing, unreadable or of different models,
            the measurements are of other profiles, or README.md is not a card.
    """
    _check_id(model)
    store = ProfileStore(directory)
    profiles = [store.load(name) for name in store.names()]
    for reason in store.invalid.values():
        raise ValueError(reason)
    if not profiles:
        raise ValueError(f"directory {directory} holds no *.safetensors profile; name another one")
    _check_one_model(profiles)
    rows = [] if measured is None else _read_rows(measured, profiles)
    card = directory / CARD
    check_output(card)
    if card.exists() and MADE_BY not in card.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{card}: `atomic-moe card` did not write it; move it elsewhere")
    plot_widths(profiles, directory / WIDTHS)
    if rows:
        plot_perplexity(perplexity_points(rows), directory / PERPLEXITY)
    text = "\n".join([*_head(model, profiles), *_profiles(profiles), *_perplexities(rows)])
    with replaced_file(card) as path:
        path.write_text(text, encoding="utf-8")
    return card


def _check_id(model: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        raise ValueError(
            f"model {shorten(model)}: wanted the Hugging Face id that people serve, as in org/name"
        ) from None


def _check_one_model(profiles: Sequence[PruningProfile]) -> None:
    first = profiles[0]
    for profile in profiles[1:]:
        if profile.model != first.model:
            raise ValueError(
                f"profiles {first.name!r} and {profile.name!r} are of different models; give each "
                "model a directory of its own"
            )


def _read_rows(path: Path, profiles: Sequence[PruningProfile]) -> list[dict[str, Any]]:
    """The rows of a measurement, dense first."""
    kept = {profile.name: profile.kept for profile in profiles}
    try:
        rows = json.loads(path.read_bytes())
        for row in rows:
            for key, kind in KEYS.items():
                if type(row[key]) is not kind:
                    raise TypeError(f"{key} is {row[key]!r}")
            if not all(type(value) is float for value in row["perplexity"].values()):
                raise TypeError("perplexity is not numbers")
        dense = rows[0]
        if dense["profile"] != DENSE or any(
            row["perplexity"].keys() != {**dense["perplexity"], "all": 0.0}.keys() for row in rows
        ):
            raise ValueError("dense is not first, or domains differ")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path}: is not what `atomic-moe eval --json` prints ({one_line(error)}); redirect "
            "its output to a file"
        ) from None
    for row in rows[1:]:
        if kept.get(row["profile"]) != row["kept"]:
            raise ValueError(
                f"{path}: measures a profile {shorten(row['profile'])} that keeps "
                f"{row['kept']:.4%}, which is not in the directory; measure these profiles"
            )
    return list(rows)


def _head(model: str, profiles: Sequence[PruningProfile]) -> list[str]:
    from huggingface_hub import ModelCardData

    masks = profiles[0].keep
    experts, size = next(iter(masks.values())).shape
    architecture = (profiles[0].model or {}).get("architecture")
    known = f"{_cell(architecture)}, " if architecture else ""
    return [
        "---",
        ModelCardData(base_model=model, tags=list(TAGS)).to_yaml(),
        "---",
        MADE_BY,
        "",
        f"# Pruned experts of {model}",
        "",
        f"Masks for [{model}](https://huggingface.co/{model}) ({known}{len(masks)} layers of "
        f"{experts} experts of {size} atoms): which atoms of its experts stay. vLLM serves them "
        "from the original checkpoint, with the plug-in vllm-atomic-moe:",
        "",
        "```sh",
        "pip install vllm-atomic-moe",
        f"vllm serve {model} --load-format atomic-pruned \\",
        "  --model-loader-extra-config "
        f"""'{{"profiles": "REPOSITORY", "active": "{profiles[0].name}"}}'""",
        "```",
        "",
        "`REPOSITORY` stands for the id of this repository.",
        "",
    ]


def _profiles(profiles: Sequence[PruningProfile]) -> list[str]:
    lines = [
        "## Profiles",
        "",
        _row("profile", "method", "atoms kept", "experts out of the router", "calibrated on"),
        _row("---", "---", "--:", "--:", "---"),
    ]
    for profile in profiles:
        excluded = sum(int((~mask).sum()) for mask in profile.routable.values())
        method = profile.metadata.get("method", "unknown")
        if package := profile.metadata.get("method_package"):
            method += f" ({package})"
        kept = f"{profile.kept:.2%}"
        lines.append(_row(profile.name, method, kept, excluded, _calibration(profile)))
    return [*lines, "", f"![Kept widths, layers by experts]({WIDTHS})", ""]


def _calibration(profile: PruningProfile) -> str:
    """Tokens and domains, if the metadata has them."""
    try:
        told = json.loads(profile.metadata["calibration"])
        return f"{told['tokens']:,} tokens: {', '.join(map(str, told['domains']))}"
    except (KeyError, TypeError, ValueError):
        return ""


def _perplexities(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "## Perplexity",
        "",
        "On held-out text, as vLLM serves the profiles; in brackets against dense.",
        "",
        *perplexity_table(rows),
        "",
        f"![Perplexity over atoms kept]({PERPLEXITY})",
        "",
    ]


def perplexity_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table of the rows of `atomic-moe eval --json`: a column per domain."""
    dense = rows[0]["perplexity"]
    lines = [
        _row("profile", "atoms kept", *dense),
        _row("---", "--:", *("--:" for _ in dense)),
    ]
    for row in rows:
        cells = [
            f"{value:.2f}" if row is rows[0] else f"{value:.2f} ({value / dense[domain] - 1:+.1%})"
            for domain, value in row["perplexity"].items()
        ]
        lines.append(_row(row["profile"], f"{row['kept']:.2%}", *cells))
    return lines


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: object) -> str:
    """Text of a file as one cell, its markup escaped."""
    line = one_line(str(text)) if text != "" else ""
    return line.replace("|", "\\|").replace("<", "&lt;")
