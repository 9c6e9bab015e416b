"""Who may use the admin endpoint: one key, checked before a request's body is read."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from vllm.logger import init_logger

from vllm_atomic_moe.control.errors import AdminError, Outcome, unavailable
from vllm_atomic_moe.control.key import KEY, fingerprint
from vllm_atomic_moe.control.metrics import profile_metrics
from vllm_atomic_moe.control.models import ErrorInfo, ErrorResponse

logger = init_logger(f"vllm.{__name__}")

LONGEST_BODY = 4096


class Access:
    """The one key that opens the endpoint.

    Args:
        key: the admin key; with None nothing is open.
        serving_keys: keys of vLLM's `--api-key`, which must not open the endpoint.

    Raises:
        ValueError: the admin key is one of them.
    """

    def __init__(self, key: str | None, serving_keys: Sequence[str | None]) -> None:
        if key is not None and key in serving_keys:
            raise ValueError(
                f"{KEY} equals a serving key (--api-key, VLLM_API_KEY); choose another admin key"
            )
        self._key = key

    def check(self, request: Request) -> None:
        """Refuse a request without the key.

        Raises:
            AdminError: 403 no key is configured, 401 it is missing or wrong.
        """
        if self._key is None:
            raise AdminError(
                403, "AdminKeyNotConfiguredError", f"no admin key is configured; start with {KEY}"
            )
        if not hmac.compare_digest(presented_key(request).encode(), self._key.encode()):
            raise AdminError(
                401, "UnauthorizedError", "wanted the admin key as `Authorization: Bearer KEY`"
            )


def presented_key(request: Request) -> str:
    """The bearer token of a request, or an empty string."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class AdminRoute(APIRoute):
    """A route that authenticates first, bounds the body, and reports errors as vLLM does.

    A change that has begun is finished even if the client disconnects. The body is parsed as JSON
    whatever the content type says, so that a plain `curl -d` works.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handle = super().get_route_handler()
        unfinished: set[asyncio.Task[Response]] = set()

        async def answer(request: Request) -> Response:
            task = asyncio.create_task(_answer(handle, request))
            unfinished.add(task)
            task.add_done_callback(unfinished.discard)
            return await asyncio.shield(task)

        return answer


async def _answer(handle: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    try:
        request.app.state.atomic_moe_access.check(request)
        return await handle(await _with_bounded_body(request))
    except AdminError as refusal:
        error = refusal
    except RequestValidationError as invalid:
        error = _bad_request(invalid)
    except HTTPException as unreadable:  # FastAPI's word for a body that is not text
        error = AdminError(400, "BadRequestError", f"body: {unreadable.detail}")
    except Exception as unexpected:
        logger.exception("Admin endpoint: %s %s failed", request.method, request.url.path)
        error = unavailable(f"{type(unexpected).__name__}: {unexpected}")
    if request.method in ("PUT", "DELETE"):
        audit(request, error.outcome, error.status, error.message)
    return error_response(error)


def audit(request: Request, outcome: Outcome, status: int, words: str) -> None:
    """Log and count one attempt to change what is served: who, what, and the outcome.

    Args:
        request: the attempt.
        outcome: of the change.
        status: HTTP status of the answer.
        words: what was changed, or why nothing was.
    """
    logger.info(
        "Profile change: key=%s client=%s %s %s status=%d outcome=%s %s",
        fingerprint(presented_key(request)),
        request.client.host if request.client else "unknown",
        request.method,
        ascii(request.url.path)[1:-1][:120],
        status,
        outcome,
        ascii(words)[1:-1],
    )
    profile_metrics().count_change(outcome)


async def _with_bounded_body(request: Request) -> Request:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_BODY:
            raise AdminError(
                400, "BadRequestError", f"the body is longer than {LONGEST_BODY} bytes"
            )
    sent = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await request.receive()
        sent = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
    headers.append((b"content-type", b"application/json"))
    return Request({**request.scope, "headers": headers}, receive)


def _bad_request(error: RequestValidationError) -> AdminError:
    """The first error of a request, without repeating what was sent."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str)) or "body"
    return AdminError(400, "BadRequestError", f"{where[:80]}: {first['msg'][:200]}")


def error_response(error: AdminError) -> JSONResponse:
    """`error` in the shape of vLLM's ErrorResponse."""
    content = ErrorResponse(
        error=ErrorInfo(message=error.message, type=error.kind, code=error.status)
    )
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(content.model_dump(), status_code=error.status, headers=headers)
