"""The client of the admin endpoint, for one server or a fleet of them. Importable without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import httpx

ANSWER_TIMEOUT_S = 90.0
# Beyond draining, a switch answers within its steps' time-outs.
SWITCH_TIMEOUT_S = 600.0

Result = Literal["switched", "unchanged", "failed", "not tried"]


class AdminClient:
    """Asks one server; a context manager.

    Args:
        url: http://host:port, with a path if the server has one.
        key: the admin key, or None.

    Raises:
        ValueError: the URL is not an HTTP URL.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"URL {url!r} does not start with http:// or https://")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=ANSWER_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def status(self) -> dict[str, Any]:
        """`GET /atomic/v1/status`. Raises as `activate`."""
        return self._ask("GET", "status")

    def profiles(self) -> list[dict[str, Any]]:
        """`GET /atomic/v1/profiles`. Raises as `activate`."""
        return self._ask("GET", "profiles")["profiles"]

    def activate(self, profile: str, mode: str, timeout_s: float) -> dict[str, Any]:
        """`PUT /atomic/v1/active`.

        Raises:
            ValueError: the server refuses, is not there, or is another kind of server; one line.
        """
        body = {"profile": profile, "mode": mode, "timeout_s": timeout_s}
        return self._ask("PUT", "active", json=body, timeout=timeout_s + SWITCH_TIMEOUT_S)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._client.request(method, f"{self.url}/atomic/v1/{path}", **options)
        except httpx.HTTPError as error:
            raise ValueError(f"{self.url}: {error or type(error).__name__}") from None
        try:
            content = answer.json()
            if answer.is_success:
                return content
            said = f"{content['error']['type']}: {content['error']['message']}"
        except (ValueError, KeyError, TypeError):
            said = (
                "no admin endpoint here; start the server with "
                "VLLM_PLUGINS=atomic_moe,atomic_moe_admin"
            )
        raise ValueError(f"{self.url}: {answer.status_code} {said}")


@dataclass(frozen=True, slots=True)
class ServerResult:
    """What became of one server of a fleet.

    Attributes:
        url: of the server.
        result: switched, unchanged, failed or not tried.
        answer: of the switch, if there was one.
        error: one line, if it failed.
    """

    url: str
    result: Result
    answer: dict[str, Any] | None = None
    error: str | None = None


@contextmanager
def fleet(urls: Sequence[str], key: str | None) -> Iterator[list[AdminClient]]:
    """Clients of several servers, each URL once."""
    with ExitStack() as stack:
        yield [stack.enter_context(AdminClient(url, key)) for url in dict.fromkeys(urls)]


def activate_fleet(
    servers: Sequence[AdminClient],
    profile: str,
    mode: str,
    timeout_s: float,
    on_progress: Callable[[int, int, str], None] = lambda done, total, url: None,
) -> list[ServerResult]:
    """Switch servers one after another, and stop at the first that fails.

    Args:
        servers: all are asked first whether they can.
        profile: to make active on each.
        mode: as in `AdminClient.activate`.
        timeout_s: as there, for each server.
        on_progress: called with (servers done, in all, URL of the next).

    Returns:
        One result per server, in order.

    Raises:
        ValueError: a server cannot switch to the profile; then none has.
    """
    for server in servers:
        _check(server, profile)
    results: list[ServerResult] = []
    for server in servers:
        if results and results[-1].result in ("failed", "not tried"):
            results.append(ServerResult(server.url, "not tried"))
            continue
        on_progress(len(results), len(servers), server.url)
        try:
            answer = server.activate(profile, mode, timeout_s)
        except ValueError as error:
            results.append(ServerResult(server.url, "failed", error=str(error)))
            continue
        result: Result = "unchanged" if answer["previous"] == profile else "switched"
        results.append(ServerResult(server.url, result, answer))
    on_progress(len(servers), len(servers), "")
    return results


def _check(server: AdminClient, profile: str) -> None:
    status = server.status()
    if status["state"] != "serving":
        raise ValueError(
            f"{server.url}: its state is {status['state']}, wanted serving; no server was switched"
        )
    if profile not in status["resident"]:
        raise ValueError(
            f"{server.url}: profile {profile!r} is not resident, "
            f"{', '.join(status['resident'])} are; no server was switched"
        )
