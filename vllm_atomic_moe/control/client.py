"""The client of the admin endpoint, for one server or a fleet of them. Importable without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import httpx

# More than all of a change's own time-outs.
ANSWER_TIMEOUT_S = 180.0

Result = Literal["changed", "unchanged", "failed", "not tried"]


class AdminClient:
    """Asks one server; a context manager. It never goes through a proxy of the environment.

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
        self._client = httpx.Client(headers=headers, timeout=ANSWER_TIMEOUT_S, trust_env=False)

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

    def activate(self, profile: str, running: str) -> dict[str, Any]:
        """`PUT /atomic/v1/active`.

        Raises:
            ValueError: the server refuses, is not there, or is another kind of server; one line.
        """
        return self._ask("PUT", "active", json={"profile": profile, "running": running})

    def load(self, profile: str) -> dict[str, Any]:
        """`PUT /atomic/v1/profiles/{profile}`. Raises as `activate`."""
        return self._ask("PUT", f"profiles/{profile}")

    def unload(self, profile: str) -> dict[str, Any]:
        """`DELETE /atomic/v1/profiles/{profile}`. Raises as `activate`."""
        return self._ask("DELETE", f"profiles/{profile}")

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
        result: changed, unchanged, failed or not tried.
        answer: of the change, if there was one.
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


def change_fleet(
    servers: Sequence[AdminClient],
    change: Callable[[AdminClient], dict[str, Any]],
    on_progress: Callable[[int, int, str], None] = lambda done, total, url: None,
) -> list[ServerResult]:
    """Change servers one after another, and stop at the first that fails.

    Args:
        servers: all must answer before the first is changed.
        change: one server -> its answer.
        on_progress: called with (servers done, in all, URL of the next).

    Returns:
        One result per server, in order.

    Raises:
        ValueError: a server does not answer; then none has been changed.
    """
    for server in servers:
        server.status()
    results: list[ServerResult] = []
    for server in servers:
        if results and results[-1].result in ("failed", "not tried"):
            results.append(ServerResult(server.url, "not tried"))
            continue
        on_progress(len(results), len(servers), server.url)
        try:
            generation = server.status()["generation"]
            answer = change(server)
        except ValueError as error:
            results.append(ServerResult(server.url, "failed", error=str(error)))
            continue
        result: Result = "unchanged" if answer["generation"] == generation else "changed"
        results.append(ServerResult(server.url, result, answer))
    on_progress(len(servers), len(servers), "")
    return results
