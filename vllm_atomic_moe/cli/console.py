"""What the subcommands share: errors, warnings, tables, JSON."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from vllm_atomic_moe.files.plain_files import check_output, one_line

# Room for the path of a Hub snapshot, what is wrong there, and the remedy.
MESSAGE_LENGTH = 400
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
# Typer's contexts are not click's: newer versions bring a click of their own.
_debugging = False


class OneLineErrors(TyperGroup):
    """Turn a refusal (ValueError, OSError) of any command into one line on stderr, exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        # A path or a name may hold what the terminal's encoding does not.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        global _debugging
        _debugging = ctx.params["debug"]
        if _debugging:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print_error(error)
            raise typer.Exit(1) from None


def debugging() -> bool:
    """Whether `atomic-moe --debug` asks for traces and for what libraries log."""
    return _debugging


def quiet_transformers() -> None:
    """Errors of transformers only, and no bars of its own, unless people debug."""
    if debugging():
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quiet_vllm() -> None:
    """Limit vLLM's log to warnings; call it before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def print_error(error: Exception | str) -> None:
    """`error: …` on stderr, always one line."""
    typer.echo(f"error: {one_line(error, MESSAGE_LENGTH)}", err=True)


def print_warning(line: str) -> None:
    """`warning: …` on stderr."""
    typer.echo(f"warning: {one_line(line, MESSAGE_LENGTH)}", err=True)


def print_note(line: str) -> None:
    """A line on stderr that says how something is done."""
    typer.echo(one_line(line, MESSAGE_LENGTH), err=True)


def print_json(value: Any) -> None:
    """`value` as indented JSON on stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers or verdicts."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        # Off a terminal rich assumes 80 columns; a file or a pipe has as many as the table needs.
        console = Console(markup=False, highlight=False, width=1000)
    console.print(table, crop=False)


class ProgressLines:
    """Progress off a terminal: one line a minute with the time left, none for shorter work."""

    INTERVAL = 60.0

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` names the work; `clock` gives seconds."""
        self._what, self._clock = what, clock
        self._first: tuple[float, int] | None = None
        self._shown = clock()

    def line(self, done: int, total: int) -> str | None:
        """The line to print when `done` steps of `total` are done, or None."""
        now = self._clock()
        if self._first is None:
            # A resumed run starts with the steps done before.
            self._first = now, done
            return None
        began, before = self._first
        if now - self._shown < self.INTERVAL or done in (before, total):
            return None
        self._shown = now
        left = (now - began) * (total - done) / (done - before)
        return f"{self._what}: {done / total:.0%}, {timedelta(seconds=round(left))} left"


@contextmanager
def progress_bar(
    first: str, then: str, in_bytes: bool = False, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, or lines off a terminal; gives (done, total) -> None.

    Args:
        first: name of the work until the first step is done.
        then: name of the work after it.
        in_bytes: steps are bytes.
        quiet: show nothing.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        # Off a terminal a bar is noise among the lines of a log.
        lines = ProgressLines(then)

        def show(done: int, total: int) -> None:
            if not quiet and (line := lines.line(done, total)):
                print_note(line)

        yield show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True) if in_bytes else TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Steps may take minutes.
    period = 600.0
    with Progress(
        *columns, console=console, transient=True, speed_estimate_period=period
    ) as progress:
        task = progress.add_task(first, total=None)
        yield lambda done, total: progress.update(
            task, description=then, completed=done, total=total
        )


def status_lines() -> Callable[[int, int, str], None]:
    """For long work, on a terminal or not: (done, total, next) -> a line on stderr."""
    console = Console(stderr=True)

    def show(done: int, total: int, name: str) -> None:
        if name:
            console.print(f"[{done + 1}/{total}] {name}", markup=False, highlight=False)

    return show


def measured(measure: Callable[[], Any]) -> tuple[Any, ValueError | None]:
    """The result of `measure`; if it fails near its end, its result until then, and the failure.

    Raises:
        ValueError: it fails with nothing measured.
    """
    try:
        return measure(), None
    except ValueError as error:
        if not (there := getattr(error, "measured", None)):
            raise
        return there, error


def check_plot(path: Path) -> None:
    """Refuse a picture that cannot be drawn or written, before the long work begins.

    Raises:
        ValueError: the name does not end in a format that is drawn, or `check_output` refuses it.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(f"plot {path}: wanted a name that ends in {', '.join(PLOT_SUFFIXES)}")
    check_output(path)


def draw(path: Path, picture: Callable[[], None], quiet: bool = False) -> bool:
    """Draw a picture; one that fails is a warning, so that what was measured is still shown.

    Args:
        path: where to.
        picture: draws and writes it.
        quiet: do not say that it was written.

    Returns:
        Whether it was written.
    """
    try:
        picture()
    except Exception as error:  # matplotlib raises what its parts raise.
        if debugging():
            raise
        print_warning(f"plot {path} was not drawn ({type(error).__name__}: {error})")
        return False
    if not quiet:
        typer.echo(f"\nwrote {path}")
    return True


def show_version(wanted: bool) -> None:
    """Callback of `--version`."""
    if wanted:
        from vllm_atomic_moe import __version__

        typer.echo(f"atomic-moe {__version__}")
        raise typer.Exit
