"""How results and asides reach a person or a pipe: JSON, aligned tables, dim lines, a progress bar.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PROGRESS_DELAY_S = 1.0
"""A bar appears only when the work takes longer than this."""

_CONTROL = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    **dict.fromkeys(range(127, 160), 0xFFFD),
}
"""Control characters to the pictures of them, newline and tab left alone."""


def on_terminal(stream: TextIO | Any) -> bool:
    """Return True when a person watches this stream."""
    try:
        return bool(stream.isatty())
    except ValueError:  # closed
        return False


def printable(text: str) -> str:
    """Return text whose control characters a terminal will show instead of obey; newline and tab stay."""
    return text.translate(_CONTROL)


def write_text(text: str) -> None:
    """Write a piece of model output at once: made safe on a terminal, untouched in a pipe."""
    sys.stdout.write(printable(text) if on_terminal(sys.stdout) else text)
    sys.stdout.flush()


def write_json(value: object, *, indent: int | None = None) -> None:
    """Write one JSON document and a newline; NaN is refused, text stays readable."""
    click.echo(json.dumps(value, ensure_ascii=not _utf8(sys.stdout), allow_nan=False, indent=indent))


def _utf8(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def aside(text: str) -> None:
    """Write a line for the person to standard error, dim on a terminal."""
    click.echo(click.style(printable(text), dim=True), err=True)


def complain(text: str) -> None:
    """Write an error line for the person to standard error; the program goes on."""
    click.echo(click.style("error: ", fg="red") + printable(text), err=True)


def write_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Write `name   value` lines, names bold and aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {printable(value)}")


def write_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write an aligned table; columns that hold only numbers lean right, nothing is cut."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    numeric = [
        all(cell[:1].isdigit() or cell in ("", "-", "all") for cell in column)
        for column in zip(*cells, strict=True)
    ]
    click.echo(click.style(_align(columns, widths, numeric), bold=True))
    for row in cells:
        click.echo(_align(row, widths, numeric))


def _align(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    parts = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(row, widths, numeric or [False] * len(widths), strict=True)
    ]
    return "  ".join(parts).rstrip()


class ProgressBar:
    """A bar on standard error, moved by calling it; silent in a pipe and for work under a second."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = on_terminal(sys.stderr)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, fraction: float) -> None:
        """Say that `fraction` (0 to 1) of the stage is done."""
        if not self._shown or time.monotonic() - self._started < PROGRESS_DELAY_S:
            return
        if self._progress is None:
            self._progress = _new_progress()
            self._task = self._progress.add_task(stage, total=1.0)
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, description=stage, completed=min(max(fraction, 0.0), 1.0))

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def _new_progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
