"""atomic-moe status, profiles, activate, load, unload: the client of the admin endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vllm_atomic_moe.cli.console import (
    print_error,
    print_json,
    print_table,
    print_warning,
    status_lines,
)

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
Proxy = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Go through this HTTP proxy; those of the environment are ignored. It sees the key on "
        "the way to an http:// server.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


KINDS = ("active", "resident", "dense")


def show_status(
    urls: Urls, key_file: KeyFile = None, proxy: Proxy = None, as_json: AsJson = False
) -> None:
    """Show what servers serve, and the memory of their experts."""
    found, errors = _ask_all(_servers(urls, key_file, proxy), lambda server: server.status())
    if as_json:
        print_json([{"url": url, **answer} for url, answer in found.items()])
    elif found:
        _print_statuses(found)
    _raise_first(errors)


def _print_statuses(found: dict[str, dict[str, Any]]) -> None:
    print_table(
        ["server", "profile", "slot", "running", "waiting", "admitted", "state"],
        [
            [
                url,
                name,
                *(str(profile[key]) for key in ("slot", "running", "waiting", "admitted")),
                "active" if name == answer["active"] else "loaded",
            ]
            for url, answer in found.items()
            for name, profile in answer["profiles"].items()
        ],
    )
    print_table(
        ["server", "engines", "changes", "active MiB", "resident", "dense"],
        [
            [
                url,
                f"{answer['engines']}{'' if answer['agreed'] else ', they disagree'}",
                str(answer["generation"]),
                *(_mib(answer["memory"][f"{kind}_bytes"]) for kind in KINDS),
            ]
            for url, answer in found.items()
        ],
    )


def list_profiles(
    urls: Urls, key_file: KeyFile = None, proxy: Proxy = None, as_json: AsJson = False
) -> None:
    """List the profiles of servers' directories, and which of them are loaded."""
    found, errors = _ask_all(_servers(urls, key_file, proxy), lambda server: server.profiles())
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
                _state(profile),
                *([url] if len(found) > 1 else []),
            ]
            for url, answer in found.items()
            for profile in answer
        ],
    )


def activate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A loaded profile, or dense.")],
    urls: Urls,
    running: Annotated[
        Literal["finish", "abort"],
        typer.Option(
            help="finish: running requests keep their profile; abort: those of other profiles end."
        ),
    ] = "finish",
    mode: Annotated[str | None, typer.Option(hidden=True)] = None,
    timeout: Annotated[float | None, typer.Option(hidden=True)] = None,
    key_file: KeyFile = None,
    proxy: Proxy = None,
    as_json: AsJson = False,
) -> None:
    """Change the profile of requests that do not name one, on servers one after another."""
    if mode is not None or timeout is not None:
        print_warning(
            "--mode and --timeout belong to version 0.1; the next version drops them; see --running"
        )
        running = "abort" if mode == "abort" else running
    _change(_servers(urls, key_file, proxy), as_json, lambda server: server.activate(name, running))


def load(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A profile of the directory.")],
    urls: Urls,
    key_file: KeyFile = None,
    proxy: Proxy = None,
    as_json: AsJson = False,
) -> None:
    """Load a profile of the servers' directory while serving; its atoms must be in memory."""
    _change(_servers(urls, key_file, proxy), as_json, lambda server: server.load(name))


def unload(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A loaded profile.")],
    urls: Urls,
    key_file: KeyFile = None,
    proxy: Proxy = None,
    as_json: AsJson = False,
) -> None:
    """Unload a profile that is not active and that no request uses."""
    _change(_servers(urls, key_file, proxy), as_json, lambda server: server.unload(name))


def _change(
    fleet: AbstractContextManager[list[AdminClient]],
    as_json: bool,
    change: Callable[[AdminClient], dict[str, Any]],
) -> None:
    """Change servers one after another; at the first failure, say which ones were changed."""
    from vllm_atomic_moe.control.client import change_fleet

    with fleet as servers:
        show = status_lines() if len(servers) > 1 else lambda done, total, url: None
        results = change_fleet(servers, change, show)
    failed = [result.error for result in results if result.error]
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        print_table(
            ["server", "result", "before", "changes"],
            [[result.url, result.result, *_told(result.answer)] for result in results],
        )
    if failed:
        raise ValueError(failed[0])


def _ask_all(
    fleet: AbstractContextManager[list[AdminClient]], question: Callable[[AdminClient], Any]
) -> tuple[dict[str, Any], list[ValueError]]:
    """URL -> answer of the servers that answer, and the failures of the others."""
    found: dict[str, Any] = {}
    errors: list[ValueError] = []
    with fleet as servers:
        for server in servers:
            try:
                found[server.url] = question(server)
            except ValueError as error:
                errors.append(error)
    return found, errors


def _raise_first(errors: list[ValueError]) -> None:
    """Print all failures but the first, which ends the command."""
    for error in errors[1:]:
        print_error(error)
    if errors:
        raise errors[0]


@contextmanager
def _servers(
    urls: list[str], key_file: Path | None, proxy: str | None
) -> Iterator[list[AdminClient]]:
    from vllm_atomic_moe.control.client import fleet
    from vllm_atomic_moe.control.key import KEY_FILE, read_key

    key = read_key({KEY_FILE: str(key_file)} if key_file else os.environ)
    with fleet(urls, key, proxy) as servers:
        yield servers


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _state(profile: dict[str, Any]) -> str:
    if profile["active"]:
        return "active"
    if profile["loaded"]:
        return "loaded"
    return "servable" if profile["servable"] else "-"


def _told(answer: dict[str, Any] | None) -> list[str]:
    if answer is None:
        return ["-"] * 2
    return [answer.get("previous", "-"), str(answer["generation"])]
