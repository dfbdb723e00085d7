"""Metrics on disk first, in the tracker when it answers: training neither waits for the tracker nor loses a row.

Rows are appended to a file of JSON lines; one thread ships them, and the mark of what is shipped advances only after
a success. Shipping a row again must be harmless (MLflow keeps one row per key, step, time and value), so a crash
between shipping and marking costs nothing. While the disk is full rows wait in memory.
"""

import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LINES_PER_SHIPMENT = 200
LONGEST_PAUSE = 30.0
"""Seconds between two tries while the tracker does not answer."""
LAST_PAUSE = 0.1
"""Seconds between two tries while the log is closing."""
STEPPED = "loss/total"
"""A key that every training step writes, and no other row."""
MEASURED = ("time/", "ranks/", "student/")
"""Keys whose values are another time's measurement when a step is done again."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A number that came out otherwise when its step was done again."""

    key: str
    step: int
    was: float
    now: float

    @property
    def relative(self) -> float:
        """Of the larger of the two; NaN where one is not finite."""
        return abs(self.was - self.now) / max(abs(self.was), abs(self.now))

    def __str__(self) -> str:
        return (
            f"{self.key} of step {self.step} was {self.was!r} and is {self.now!r} now that it was done again; the old "
            "row stays. Equal workers on equal machines would have come to the same"
        )


@dataclass(frozen=True)
class Row:
    """One number of one step."""

    key: str
    value: float
    step: int
    time_ms: int
    """Since the epoch, when the row was first written."""


Ship = Callable[[list[Row]], None]
"""Hands rows to the tracker, all or with an exception. It may be called again with the same rows."""


class MetricLog:
    """The metrics of one run, written by one process at a time. A continued run opens the same file.

    A step that is done again after a restart writes only the keys that it has not written before: the first row of a
    key and a step is the one that stays. What it would have written is compared with what is there.
    """

    def __init__(
        self,
        path: Path,
        ship: Ship,
        every: float = 1.0,
        begin: int | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`begin`: the first step to come, where this one goes on; rows from there on are compared. `tell` is told when
        the tracker stops answering and when it answers again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._mark, self._ship, self._every = path, path.with_suffix(".shipped"), ship, every
        self._file = path.open("ab", buffering=0)
        # A worker of a driver that was killed may live some seconds longer: nobody reads or writes before it is gone.
        fcntl.flock(self._file, fcntl.LOCK_EX)
        _cut_torn_line(path)
        self._shared: dict[frozenset[str], frozenset[str]] = {}
        self._before: dict[tuple[int, str], float] = {}
        self._written = _written(path, self._shared, self._before, begin)
        self.difference: Difference | None = None
        self._shipped = _read_mark(self._mark, path.stat().st_size)
        self._waiting, self._tell = b"", tell
        self._failure: Exception | None = None
        self._deadline, self._done = 0.0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ship_until_stopped, name="metric-log", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step. Returns at once, whatever the tracker does."""
        old = self._written.get(step, frozenset())
        new = {key: float(value) for key, value in metrics.items() if key not in old}
        for key, value in metrics.items():
            self._compare(step, key, float(value))
        if new:
            self._written[step] = _kept_once(old.union(new), self._shared)
            line = json.dumps({"t": time.time_ns() // 1_000_000, "s": step, "m": new}) + "\n"
            self._waiting += line.encode()
            with suppress(OSError):  # they wait in memory, and `sync` tells
                self._write()

    def sync(self) -> None:
        """Have all rows on disk. OSError where it does not take them."""
        self._write()
        os.fsync(self._file.fileno())

    @property
    def reached(self) -> int:
        """The first step of which nothing is written."""
        return 1 + max((step for step, keys in self._written.items() if STEPPED in keys), default=-1)

    @property
    def failure(self) -> Exception | None:
        """Why the last try to ship failed; None when all is well."""
        return self._failure

    def close(self, timeout: float = 10.0) -> bool:
        """Ship what is left, trying for `timeout` seconds. False: rows wait in the file for the next one to open it."""
        with suppress(OSError):
            # Where the disk is full, steps whose rows are lost are done again: no checkpoint goes before its rows.
            self.sync()
        self._file.close()
        self._deadline = time.monotonic() + timeout
        self._stop.set()
        # Only the thread talks to the tracker: a call that hangs there never holds up the caller.
        self._thread.join(timeout)
        return self._done and not self._waiting

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _compare(self, step: int, key: str, value: float) -> None:
        """Remember the largest difference to what an earlier pass over this step wrote."""
        was = self._before.pop((step, key), None)
        if was is None or key.startswith(MEASURED) or was == value or (math.isnan(was) and math.isnan(value)):
            return
        found = Difference(key=key, step=step, was=was, now=value)
        if self.difference is None or not found.relative <= self.difference.relative:
            self.difference = found

    def _ship_until_stopped(self) -> None:
        pause = self._every
        while not self._stop.wait(pause):
            pause = self._every if self._try_to_ship() else min(LONGEST_PAUSE, 2 * pause)
        while not self._try_to_ship() and time.monotonic() < self._deadline:
            time.sleep(LAST_PAUSE)
        self._done = self._failure is None

    def _try_to_ship(self) -> bool:
        """Ship all whole lines; whether that worked."""
        try:
            while lines := self._next_lines():
                self._ship([row for line in lines for row in _rows(line)])
                self._shipped += sum(len(line) for line in lines)
                with suppress(OSError):  # a full disk: shipping them again is harmless
                    _write_mark(self._mark, self._shipped)
        except Exception as error:
            # Whatever the tracker throws, training goes on and the rows stay in the file.
            if self._failure is None:
                told = str(error).splitlines()[0][:160] if str(error) else repr(error)
                self._tell(f"the tracker does not answer ({told}); training goes on, metrics wait in {self._path}")
            self._failure = error
            return False
        if self._failure is not None:
            self._tell("the tracker answers again and has all metrics")
        self._failure = None
        return True

    def _next_lines(self) -> list[bytes]:
        with self._path.open("rb") as file:
            file.seek(self._shipped)
            lines = [file.readline() for _ in range(LINES_PER_SHIPMENT)]
        return [line for line in lines if line.endswith(b"\n")]


def _rows(line: bytes) -> list[Row]:
    found = json.loads(line)
    return [Row(key, value, found["s"], found["t"]) for key, value in found["m"].items()]


def _cut_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line: drop it, its step will be done again."""
    path.touch()
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _kept_once(keys: frozenset[str], shared: dict[frozenset[str], frozenset[str]]) -> frozenset[str]:
    """Steps write the same keys again and again: one set for all of them keeps a long run small."""
    return shared.setdefault(keys, keys)


def _written(
    path: Path,
    shared: dict[frozenset[str], frozenset[str]],
    values: dict[tuple[int, str], float],
    begin: int | None,
) -> dict[int, frozenset[str]]:
    """The keys that each step has written; with their `values` from step `begin` on."""
    written: dict[int, frozenset[str]] = {}
    with path.open("rb") as file:
        for line in file:
            found = json.loads(line)
            keys = written.get(found["s"], frozenset()).union(found["m"])
            written[found["s"]] = _kept_once(keys, shared)
            if begin is not None and found["s"] >= begin:
                values |= {(found["s"], key): value for key, value in found["m"].items()}
    return written


def _read_mark(path: Path, size: int) -> int:
    """Bytes that are shipped; 0 where the mark is lost or not of this file: shipping all again is harmless."""
    try:
        offset = int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0
    return offset if 0 <= offset <= size else 0


def _write_mark(path: Path, offset: int) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(str(offset))
    fresh.replace(path)
