"""atomic-moe check: do profiles fit a model? The same code as in the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_atomic_moe.cli.console import print_error, print_json, print_table, print_warning
from vllm_atomic_moe.cli.profiles import PROFILES_HELP, profile_files


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local directory or Hugging Face id.")
    ],
    profiles: Annotated[
        list[str],
        typer.Argument(metavar="PROFILE...", help=PROFILES_HELP),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check profiles against a model, before a server does.

    Only the server can tell what vLLM builds for the architecture and what its flags ask for.

    Exit code 1 if any profile is refused; each refusal is one line on stderr.
    """
    from vllm_atomic_moe.files.checkpoint import describe_checkpoint, resolve_model

    files = profile_files(profiles)
    checkpoint = describe_checkpoint(resolve_model(model))
    results = [_check_file(file, checkpoint) for file in files]

    if as_json:
        print_json(
            {
                "model": checkpoint.identity(),
                "row_formats": checkpoint.row_formats,
                "profiles": results,
            }
        )
    else:
        if checkpoint.row_formats.keys() != {"plain"}:
            typer.echo(f"experts: {_formats(checkpoint.row_formats)}\n")
        print_table(
            ["profile", "verdict", "kept", "file"],
            [
                [
                    result["name"] or "?",
                    _verdict(result),
                    f"{result['kept']:.2%}" if result["kept"] is not None else "-",
                    Path(result["file"]).name,
                ]
                for result in results
            ],
        )
        typer.echo(
            f"only the server can tell: whether vLLM has a model of its own for "
            f"{checkpoint.architecture}, what its experts compute, and what flags ask for"
        )
    for result in results:
        for warning in result["warnings"]:
            print_warning(warning)
        if not result["ok"]:
            print_error(result["error"])
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def _formats(row_formats: Mapping[str, list[int]]) -> str:
    """fp8 128x128; where layers differ, with their indices."""
    if len(row_formats) == 1:
        return next(iter(row_formats))
    return "; ".join(
        f"{name} in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        for name, layers in row_formats.items()
    )


def _verdict(result: Mapping[str, Any]) -> str:
    if not result["ok"]:
        return "refused"
    return "ok, compensated" if result["compensated"] else "ok"


def _check_file(file: Path, checkpoint: Any) -> dict[str, Any]:
    from vllm_atomic_moe.files.profiles import PruningProfile

    result: dict[str, Any] = {
        "file": str(file),
        "name": None,
        "ok": False,
        "kept": None,
        "compensated": None,
        "warnings": [],
        "error": None,
    }
    try:
        profile = PruningProfile.read(file)
        result |= {"name": profile.name, "kept": profile.kept}
        result |= {"compensated": bool(profile.compensation)}
        result |= {"warnings": profile.check(checkpoint), "ok": True}
    except ValueError as error:
        text = str(error)
        result["error"] = text if str(file) in text else f"{file}: {text}"
    return result
