"""What a person sees while a command runs (on stderr) and when it is done (on stdout)."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

WIDTH_WITHOUT_TERMINAL = 160


class Report(Protocol):
    """Told now and then how much is done."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total`, and a few words on how it goes."""
        ...


@contextmanager
def progress(label: str, every: float = 10.0, stream: TextIO | None = None) -> Iterator[Report]:
    """A bar in a terminal; elsewhere (job logs, CI) a plain line at most every `every` seconds, and a last one."""
    out: TextIO = stream or sys.stderr
    if out.isatty():
        with _bar(label, out) as report:
            yield report
    else:
        lines = _Lines(label, every, out)
        try:
            yield lines
        finally:
            lines.finish()


@contextmanager
def _bar(label: str, stream: TextIO) -> Iterator[Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *times, console=Console(file=stream)) as bars:
        task = bars.add_task(label, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield report


class _Lines:
    """Progress as lines of text."""

    def __init__(self, label: str, every: float, stream: TextIO) -> None:
        self._label, self._every, self._stream = label, every, stream
        self._began = self._told = time.monotonic()
        self._first: int | None = None
        self._waiting: tuple[int, int, str] | None = None
        self._told_all = False

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._first is None:
            self._first = done
        self._waiting = (done, total, note)
        # What is told of a whole run after its last step (its AP, say) waits for the next line.
        news = done >= total and not self._told_all
        if time.monotonic() - self._told >= self._every or news:
            self._told_all = done >= total
            self._tell()

    def finish(self) -> None:
        self._tell()

    def _tell(self) -> None:
        if self._waiting is None:
            return
        done, total, note = self._waiting
        self._waiting, self._told = None, time.monotonic()
        # What a resumed run had done before says nothing about the speed of this one.
        rate = (done - (self._first or 0)) / max(1e-9, self._told - self._began)
        left = f", {_clock((total - done) / rate)} left" if rate > 0 and done < total else ""
        share = f" ({100 * done / total:.0f} %)" if total else ""
        speed = f", {rate:.3g}/s{left}" if rate > 0 else " were done before" if done == total else ""
        words = f"{self._label}: {done}/{total}{share}{speed}"
        self._stream.write(f"{words}  {note}\n" if note else f"{words}\n")
        self._stream.flush()


def table(
    title: str, rows: Sequence[Mapping[str, object]], stream: TextIO | None = None, *, left: bool = False
) -> None:
    """A closing table, one column per key of the first row. Floats are shown with four digits. `left`: the columns
    hold words, not numbers."""
    out: TextIO = stream or sys.stdout
    console = Console(file=out, width=None if out.isatty() else WIDTH_WITHOUT_TERMINAL)
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(rows[0] if rows else {}):
        shown.add_column(column, justify="right" if number and not left else "left")
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in rows[0]))
    console.print(shown)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
