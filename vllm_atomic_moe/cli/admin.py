"""atomic-moe status, profiles, activate: the client of running servers' admin endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_atomic_moe.cli.console import print_error, print_json, print_table, status_lines
from vllm_atomic_moe.engine import Mode

if TYPE_CHECKING:
    from vllm_atomic_moe.control.client import AdminClient

Urls = Annotated[
    list[str], typer.Option("--url", metavar="URL", help="http://host:port; repeat for a fleet.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the admin key.",
        show_default="ATOMIC_MOE_ADMIN_KEY or ATOMIC_MOE_ADMIN_KEY_FILE",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


KINDS = ("active", "resident", "dense")


def show_status(urls: Urls, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """Show what servers answer with now, and the memory of their experts."""
    found, errors = _ask_all(urls, key_file, lambda server: server.status())
    if as_json:
        print_json([{"url": url, **answer} for url, answer in found.items()])
    elif found:
        _print_statuses(found)
    _raise_first(errors)


def _print_statuses(found: dict[str, dict[str, Any]]) -> None:
    print_table(
        ["server", "active", "state", "switches", "active MiB", "resident", "dense", "last switch"],
        [
            [
                url,
                answer["active"],
                answer["state"],
                str(answer["generation"]),
                *(_mib(answer["memory"][f"{kind}_bytes"]) for kind in KINDS),
                _last(answer["last_switch"]),
            ]
            for url, answer in found.items()
        ],
    )


def list_profiles(urls: Urls, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """List the profiles that servers know, and which of them are resident."""
    found, errors = _ask_all(urls, key_file, lambda server: server.profiles())
    if as_json:
        print_json([{"url": url, "profiles": answer} for url, answer in found.items()])
    elif found:
        _print_profiles(found)
    _raise_first(errors)


def _print_profiles(found: dict[str, list[dict[str, Any]]]) -> None:
    print_table(
        ["profile", "method", "kept", "MiB", "state", *(["server"] if len(found) > 1 else [])],
        [
            [
                profile["name"],
                profile["method"] or "-",
                f"{profile['kept']:.1%}",
                _mib(profile["bytes"]),
                "active" if profile["active"] else "resident" if profile["resident"] else "-",
                *([url] if len(found) > 1 else []),
            ]
            for url, answer in found.items()
            for profile in answer
        ],
    )


def activate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A resident profile, or dense.")],
    urls: Urls,
    mode: Annotated[
        Mode, typer.Option(help="wait: begun requests finish; abort: all requests end.")
    ] = "wait",
    timeout: Annotated[
        float, typer.Option(min=0.001, max=3600, metavar="SECONDS", help="For draining, each.")
    ] = 60,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Switch servers to a profile while they serve, one after another.

    All are checked first. At the first failure it stops and says which servers switched.
    """
    from vllm_atomic_moe.control.client import activate_fleet

    with _servers(urls, key_file) as servers:
        show = status_lines() if len(servers) > 1 else lambda done, total, url: None
        results = activate_fleet(servers, name, mode, timeout, show)
    failed = [result.error for result in results if result.error]
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        print_table(
            ["server", "result", "before", "drain ms", "commit ms", "total ms"],
            [[result.url, result.result, *_times(result.answer)] for result in results],
        )
    if failed:
        raise ValueError(failed[0])


def _ask_all(
    urls: list[str], key_file: Path | None, question: Callable[[AdminClient], Any]
) -> tuple[dict[str, Any], list[ValueError]]:
    """URL -> answer of those that answer, and what the others' failures are."""
    found: dict[str, Any] = {}
    errors: list[ValueError] = []
    with _servers(urls, key_file) as servers:
        for server in servers:
            try:
                found[server.url] = question(server)
            except ValueError as error:
                errors.append(error)
    return found, errors


def _raise_first(errors: list[ValueError]) -> None:
    """The first failure ends the command, the others are said before."""
    for error in errors[1:]:
        print_error(error)
    if errors:
        raise errors[0]


@contextmanager
def _servers(urls: list[str], key_file: Path | None) -> Iterator[list[AdminClient]]:
    from vllm_atomic_moe.control.client import fleet
    from vllm_atomic_moe.control.key import KEY_FILE, read_key

    key = read_key({KEY_FILE: str(key_file)} if key_file else os.environ)
    with fleet(urls, key) as servers:
        yield servers


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _last(switch: dict[str, Any] | None) -> str:
    if switch is None:
        return "-"
    return f"{switch['outcome']} in {switch['total_ms']:.0f} ms"


def _times(answer: dict[str, Any] | None) -> list[str]:
    if answer is None:
        return ["-"] * 4
    times = (answer[f"{part}_ms"] for part in ("drain", "commit", "total"))
    return [answer["previous"], *(f"{time:.1f}" for time in times)]
