"""What happened to a run, in sentences: workers write them into the run's folder, the driver repeats them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

NOTES = "log.txt"


def note(folder: Path, text: str) -> None:
    """Append one line, with the time in UTC, to the run's log."""
    with (folder / NOTES).open("a") as file:
        file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}  {text}\n")


@contextmanager
def repeated(folder: Path, say: Callable[[str], None], every: float = 0.5) -> Iterator[None]:
    """Say what is noted while inside, without what stood there before; the last lines at the end."""
    path, done = folder / NOTES, threading.Event()
    position = path.stat().st_size if path.exists() else 0

    def repeat() -> None:
        at, last = position, False
        while not last:
            last = done.wait(every)
            at = _told(path, at, say)

    thread = threading.Thread(target=repeat, name="notes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _told(path: Path, position: int, say: Callable[[str], None]) -> int:
    """Say the whole lines behind `position`; the position behind them."""
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        lines = [line for line in file if line.endswith(b"\n")]
    for line in lines:
        say(line.decode().rstrip("\n"))
    return position + sum(map(len, lines))
