"""What the command prints: tables and results on standard output, progress and notices on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from autoeff.search.run import Progress

__all__ = ["Watcher", "duration", "print_error", "print_json", "print_pairs", "print_table"]

_PIPED_WIDTH = 200
"""Columns of a table that no terminal shows; at 80 rich would cut its cells."""
_PHASES = {
    "loading": "loading the model",
    "bank": "building the level bank",
    "baselines": "measuring the baselines",
    "table": "measuring the damage table",
    "search": "searching",
    "measuring": "measuring proposals",
    "confirming": "confirming on held-out text",
    "reporting": "writing the report",
    "done": "done",
}
_MILESTONE = 0.25
"""Share of the budget after which a piped search prints a line."""


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, left: int = 1) -> None:
    """A table on standard output; after the first `left` columns come figures, which are set to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=i >= left)
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    _console().print(table)


def print_pairs(pairs: Mapping[str, object]) -> None:
    """Names and values, one a line, on standard output."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def print_error(message: str) -> None:
    """The one line that says what is wrong, on standard error."""
    sys.stderr.write(f"autoeff: error: {' '.join(message.split())}\n")


def duration(seconds: float) -> str:
    """Seconds for people: `48 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Watcher:
    """Shows how a search goes: a live line on a terminal, else a line whenever a phase or a quarter of the budget is reached.

    A context manager; pass its `watch` to the search.
    """

    def __init__(self) -> None:
        self._live: Live | None = None
        self._phase = ""
        self._milestone = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(console=_console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, progress: Progress) -> None:
        """Takes in one report of the search."""
        if progress.notice:
            self._print(f"notice: {progress.notice}")
        if self._live is not None:
            self._live.update(_line(progress))
            return
        reached = progress.used / progress.budget if progress.budget else 0.0
        if progress.phase != self._phase or reached >= self._milestone:
            self._phase, self._milestone = progress.phase, reached // _MILESTONE * _MILESTONE + _MILESTONE
            self._print(describe(progress))

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(f"autoeff: {line}\n")
            sys.stderr.flush()


def describe(progress: Progress) -> str:
    """One line on where a search stands."""
    parts = [_PHASES.get(progress.phase, progress.phase)]
    if progress.total:
        parts.append(f"{progress.done}/{progress.total}")
    elif progress.done:
        parts.append(f"{progress.done} trial{'s' if progress.done > 1 else ''}")
    if progress.used:
        parts.append(f"{progress.used:.4g} of {progress.budget:.4g} evaluations")
    if progress.best is not None:
        parts.append(f"best {progress.quality} {progress.best:.4g}")
    if progress.front:
        parts.append(f"{progress.front} on the front")
    if progress.failures:
        parts.append(f"{progress.failures} failed")
    parts.append(duration(progress.seconds))
    if progress.eta_s is not None:
        parts.append(f"{duration(progress.eta_s)} left")
    return ", ".join(parts)


def _line(progress: Progress) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    done, total = (progress.done, progress.total) if progress.total else (progress.used, progress.budget)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=24)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(ProgressBar(total=total, completed=done), Text(describe(progress)))
    return grid


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPED_WIDTH, soft_wrap=False, highlight=False)
