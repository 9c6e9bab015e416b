"""A measurement of hours that fails near its end: what was measured is kept."""

from __future__ import annotations

from typing import Any


class IncompleteError(ValueError):
    """One line that says what failed.

    Attributes:
        measured: what was measured before, in the form of a whole result.
    """

    def __init__(self, line: str, measured: Any) -> None:
        super().__init__(line)
        self.measured = measured
