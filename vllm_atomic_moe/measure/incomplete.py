"""A long measurement that fails near its end keeps its results."""

from __future__ import annotations

from typing import Any


class IncompleteError(ValueError):
    """One line that says what failed.

    Attributes:
        measured: the results until then, in the form of a whole result.
    """

    def __init__(self, line: str, measured: Any) -> None:
        super().__init__(line)
        self.measured = measured
