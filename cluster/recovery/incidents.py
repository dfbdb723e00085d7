"""What happened to a run and what was done about it: rows beside its metrics, one line each to the person at the
terminal, whoever noticed it where.

A row with `what` waits for the one with `done`; both become one line. A row with `now` is told at once.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_sharding.world import World

INCIDENTS = "incidents.jsonl"
SPARE = "incidents.spare"
"""Room on the disk that is kept for telling that there is none."""
SPARE_BYTES = 1 << 16


def note(folder: Path, **facts: object) -> None:
    """Append a row. One write: rows of several processes do not mix. On a full disk the room that was set aside is
    given up for it; what the disk does not take even then is left out: nothing may fail for want of a message."""
    line = (json.dumps({"time": time.time(), **facts}) + "\n").encode()
    with suppress(OSError):
        if not _appended(folder / INCIDENTS, line):
            (folder / SPARE).unlink()
            _appended(folder / INCIDENTS, line)


def set_aside(folder: Path) -> None:
    """Keep some room for rows, which a full disk would not take."""
    with suppress(OSError), (folder / SPARE).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SPARE_BYTES)


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    path = folder / INCIDENTS
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for row in map(_row, lines) if row is not None]


def note_resumed(folder: Path, *, step: int, reached: int, total: int, world: World) -> None:
    """That a run goes on from `step` though it had `reached` a later one."""
    again = f", {reached - step} step(s) are done again" if reached > step else ""
    workers = f"{world.size} worker{'s' if world.size > 1 else ''}"
    note(
        folder,
        done=f"goes on from step {step} of {total} with {workers}{again}",
        step=step,
        redone=max(0, reached - step),
        workers=world.size,
    )


class Teller:
    """Makes lines of the rows that are written after it was made, for which it keeps room until `close`."""

    def __init__(self, folder: Path, name: str, say: Callable[[str], None]) -> None:
        self._path, self._name, self._say = folder / INCIDENTS, name, say
        set_aside(folder)
        self._position = self._path.stat().st_size if self._path.exists() else 0
        self._waiting: list[str] = []

    def look(self) -> None:
        """Tell what is new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            lines = [line for line in file if line.endswith(b"\n")]
        self._position += sum(map(len, lines))
        for row in filter(None, map(_row, lines)):
            self._take(row)

    def close(self) -> None:
        """Tell what nothing was done about."""
        self.look()
        if self._waiting:
            self._tell("; ".join(self._waiting))
        self._waiting = []
        self._path.with_name(SPARE).unlink(missing_ok=True)

    def _take(self, row: Mapping[str, Any]) -> None:
        if "now" in row:
            self._tell(str(row["now"]))
        if "what" in row:
            self._waiting.append(str(row["what"]))
        if "done" in row:
            self._tell("; ".join([*self._waiting, str(row["done"])]))
            self._waiting = []

    def _tell(self, text: str) -> None:
        self._say(f"{self._name}: {text}")


def _appended(path: Path, line: bytes) -> bool:
    """Whether the disk took all of it."""
    try:
        with path.open("ab", buffering=0) as file:
            return file.write(line) == len(line)
    except OSError:
        return False


def _row(line: bytes) -> dict[str, Any] | None:
    """A row; None for one that a full disk cut."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
