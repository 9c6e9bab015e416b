"""The client of the admin endpoint, for one server or a fleet of them. Importable without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from vllm_atomic_moe.control.models import (
    ActiveAnswer,
    LoadAnswer,
    Profiles,
    Status,
    UnloadAnswer,
)

# More than the sum of a change's own timeouts.
ANSWER_TIMEOUT_S = 180.0

Result = Literal["changed", "unchanged", "failed", "not tried"]


class AdminClient:
    """Asks one server; a context manager. It ignores proxies that the environment names.

    Args:
        url: http://host:port, with a path if the server has one.
        key: the admin key, or None.
        proxy: http:// or https:// URL of a proxy to go through, which then reads the key on the way
            to an http:// server; None for a direct connection.

    Raises:
        ValueError: a URL is not an HTTP URL.
    """

    def __init__(self, url: str, key: str | None, proxy: str | None = None) -> None:
        self.url = url.rstrip("/")
        for name, one in (("URL", url), ("proxy", proxy or url)):
            try:
                sound = httpx.URL(one).scheme in ("http", "https") and bool(httpx.URL(one).host)
            except httpx.InvalidURL:
                sound = False
            if not sound:
                raise ValueError(f"{name} {one!r}: wanted http://host:port or https://host:port")
        try:
            # Of the environment only certificates (SSL_CERT_FILE, SSL_CERT_DIR).
            verify = httpx.create_ssl_context() if "https://" in f"{url} {proxy}" else False
        except OSError as error:
            raise ValueError(
                f"certificates cannot be read ({error}); see SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=ANSWER_TIMEOUT_S,
            trust_env=False,
            verify=verify,
            proxy=proxy,
        )

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
        return self._ask("GET", "status", Status)

    def profiles(self) -> list[dict[str, Any]]:
        """`GET /atomic/v1/profiles`. Raises as `activate`."""
        return self._ask("GET", "profiles", Profiles)["profiles"]

    def activate(self, profile: str, running: str) -> dict[str, Any]:
        """`PUT /atomic/v1/active`.

        Raises:
            ValueError: the server refuses, is not there, or is another kind of server; one line.
        """
        body = {"profile": profile, "running": running}
        return self._ask("PUT", "active", ActiveAnswer, json=body)

    def load(self, profile: str) -> dict[str, Any]:
        """`PUT /atomic/v1/profiles/{profile}`. Raises as `activate`."""
        return self._ask("PUT", f"profiles/{quote(profile, safe='')}", LoadAnswer)

    def unload(self, profile: str) -> dict[str, Any]:
        """`DELETE /atomic/v1/profiles/{profile}`. Raises as `activate`."""
        return self._ask("DELETE", f"profiles/{quote(profile, safe='')}", UnloadAnswer)

    def _ask(self, method: str, path: str, kind: type[BaseModel], **options: Any) -> Any:
        """The content of an answer of one kind."""
        try:
            answer = self._client.request(method, f"{self.url}/atomic/v1/{path}", **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"{self.url}: {error or type(error).__name__}") from None
        try:
            content = answer.json()
        except ValueError:  # not JSON, or in another encoding than it says
            content = None
        if answer.is_success:
            with suppress(ValidationError):
                kind.model_validate(content)
                return content
        raise ValueError(f"{self.url}: {answer.status_code} {_refusal(answer, content)}")


def _refusal(answer: httpx.Response, content: Any) -> str:
    """What an unexpected answer says."""
    error = content.get("error") if isinstance(content, dict) else None
    known = error if isinstance(error, dict) and {"type", "message"} <= error.keys() else None
    # vLLM's own answer to a path that it does not know, or FastAPI's.
    lacking = known["type"] == "Not Found" if known else isinstance(content, dict) and not error
    if answer.status_code == 404 and lacking:
        return (
            "no admin endpoint here; start the server with VLLM_PLUGINS=atomic_moe,atomic_moe_admin"
        )
    if known:
        return f"{known['type']}: {known['message']}"
    kind = answer.headers.get("content-type", "no content type")
    return (
        f"the answer is not from a vLLM server ({kind}, {answer.text[:60]!r}); "
        "is a proxy or another service at this address?"
    )


@dataclass(frozen=True, slots=True)
class ServerResult:
    """The outcome for one server of a fleet.

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
def fleet(
    urls: Sequence[str], key: str | None, proxy: str | None = None
) -> Iterator[list[AdminClient]]:
    """Clients of several servers, each URL once."""
    with ExitStack() as stack:
        yield [stack.enter_context(AdminClient(url, key, proxy)) for url in dict.fromkeys(urls)]


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
