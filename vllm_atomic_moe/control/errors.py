"""Errors of the admin endpoint."""

from __future__ import annotations

from typing import Literal

Outcome = Literal["changed", "unchanged", "refused", "failed"]


class AdminError(Exception):
    """An answer that is not a success.

    Attributes:
        status: HTTP status.
        kind: stable name of the reason, the `type` of vLLM's ErrorResponse.
        message: one line.
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message

    @property
    def outcome(self) -> Outcome:
        """The outcome of a change that ended with this error."""
        return "failed" if self.status == 503 else "refused"


def unavailable(message: str) -> AdminError:
    """503: an engine is missing, or does not answer."""
    return AdminError(503, "EngineUnavailableError", message)
