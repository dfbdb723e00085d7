"""A run that hangs is noticed, the rank that holds it up is named, and the workers start again.

Every rank leaves a sign of life in the run's folder: a beat of a thread of its own, and how far its training thread
is. In step with each other they all stand still when one does. Ranks 0 and 1 look at all of them; one that finds
that nobody has moved for too long writes down who is behind and ends its own process, upon which Ray Train starts all
workers again. Two look so that one may hang. (Were both gone, Ray's own check of its workers would notice.)

A node that nobody reaches any more may live, and its worker hold the run's files: it sees that there was another start
and ends itself.
"""

import json
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cluster.recovery.incidents import note
from data_sharding.files import write_atomically
from data_sharding.world import World

FOLDER = "pulse"
NEWEST = "newest"
"""The file in it that names the last start."""
LOOKS = 20
"""Beats within the patience."""
SHORTEST, LONGEST = 0.2, 10.0
"""Seconds between two beats."""
WATCHERS = 2
"""As many ranks look at the others."""

Sign = Mapping[str, Any]
"""What a rank leaves: its place, `beat`, `moved`, `step`, `doing`."""


def begin(folder: Path, world: World) -> str:
    """A word for this start of the run in `folder`, the same on all ranks, who call it together."""
    word = uuid.uuid4().hex
    if world.rank == 0:
        with suppress(OSError):
            (folder / FOLDER).mkdir(exist_ok=True)
            write_atomically(folder / FOLDER / NEWEST, word.encode())
    return str(world.gather(word)[0])


class Pulse:
    """This rank's sign of life, beaten by a thread until `close`."""

    def __init__(
        self, folder: Path, world: World, attempt: str, patience: float, passed: Callable[[], int] = lambda: 0
    ) -> None:
        """`attempt`: the word of `begin`. `passed`: a count that grows as the training thread
        moves on. `patience`: seconds without a movement of anyone."""
        self._folder, self._world, self._attempt, self._passed = folder / FOLDER, world, attempt, passed
        self._run_folder, self._patience = folder, patience
        self._beat, self._further, self._step, self._doing = 0, 0, 0, "starting"
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._was_newest = False
        self._folder.mkdir(exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._live, name="pulse", daemon=True)
        self._thread.start()

    def moved(self, *_: object) -> None:
        """The training thread has moved on, in something that `passed` does not count."""
        self._further += 1

    def at(self, step: int) -> None:
        """This step begins."""
        self._step, self._doing = step, "training"

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, the training thread does something other than steps. Written at once."""
        self._doing = what
        self.moved()
        self._write()
        yield
        self._doing = "training"
        self.moved()
        self._write()

    def close(self) -> None:
        """This rank is done: nobody waits for it."""
        self._stop.set()
        self._thread.join()
        self._doing = DONE
        self._write()

    def _live(self) -> None:
        every = min(LONGEST, max(SHORTEST, self._patience / LOOKS))
        watch = Watch(self._patience)
        while not self._stop.wait(every):
            self._beat += 1
            if self._left_behind():
                note(
                    self._run_folder, now=f"rank {self._world.rank} of an earlier start lived yet and has ended itself"
                )
                os.kill(os.getpid(), signal.SIGKILL)
            if not self._write():  # a full disk stops everybody's signs: they say nothing
                watch = Watch(self._patience)
            elif self._world.rank < WATCHERS:
                told = watch.look(self._signs(), time.monotonic())
                if told and (self._world.rank == 0 or 0 in told):
                    self._end(told)

    def _write(self) -> bool:
        """Whether the disk took it; the sign before stays where not."""
        sign = {
            "attempt": self._attempt,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "beat": self._beat,
            "moved": self._passed() + self._further,
            "step": self._step,
            "doing": self._doing,
        }
        path = self._folder / f"{self._world.rank:05d}.json"
        try:
            with self._lock:
                path.with_suffix(".new").write_text(json.dumps(sign))
                path.with_suffix(".new").replace(path)
        except OSError:
            return False
        return True

    def _left_behind(self) -> bool:
        """Whether there was another start since this one. A file that was replaced may be seen late on another node:
        this start must have been the newest before."""
        try:
            newest = (self._folder / NEWEST).read_text()
        except OSError:
            return False
        self._was_newest = self._was_newest or newest == self._attempt
        return self._was_newest and newest != self._attempt

    def _signs(self) -> dict[int, Sign]:
        """Every rank's newest sign of this start; empty of one that has left none."""
        return {rank: _sign(self._folder / f"{rank:05d}.json", self._attempt) for rank in range(self._world.size)}

    def _end(self, told: Mapping[int, str]) -> None:
        what = "; ".join(f"rank {rank} hangs: {why}" for rank, why in told.items())
        note(self._run_folder, what=f"{what}; no rank has moved for {self._patience:.0f} s", ranks=sorted(told))
        signs = self._signs()
        for rank in told:
            _end_beside(signs[rank])
        os.kill(os.getpid(), signal.SIGKILL)


DONE = "done"


class Watch:
    """Tells from signs of life whether all stand still, and who holds them up."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._moved: dict[int, int] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._since: float | None = None

    def look(self, signs: Mapping[int, Sign], now: float) -> dict[int, str]:
        """`signs` by rank, at the time `now` in seconds; whom to blame and why, empty while all is well."""
        working = {rank: sign for rank, sign in signs.items() if sign.get("doing") != DONE}
        moved = {rank: int(sign.get("moved", -1)) for rank, sign in working.items()}
        for rank, sign in working.items():
            beat = int(sign.get("beat", -1))
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = (beat, now)
        if self._since is None or moved != self._moved:
            self._moved, self._since = moved, now
        if not working or now - self._since <= self._patience:
            return {}
        return self._blamed(working, now)

    def _blamed(self, working: Mapping[int, Sign], now: float) -> dict[int, str]:
        """Processes that do not live; else the ranks that are least far."""
        still = {rank: now - since for rank, (_, since) in self._beats.items() if rank in working}
        frozen = [rank for rank, seconds in still.items() if seconds > self._patience / 2]
        if frozen and len(frozen) < len(working):
            return {rank: f"no sign of life for {still[rank]:.0f} s{_place(working[rank])}" for rank in frozen}
        least = min(self._moved.values())
        return {r: f"it is behind{_place(working[r])}" for r, moved in self._moved.items() if moved == least}


def forget(folder: Path) -> None:
    """Delete the signs of life of a run that has ended."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _end_beside(sign: Sign) -> None:
    """End the process of a sign where it is another worker of this node: one that is stopped hears no other word."""
    with suppress(OSError, psutil.Error):
        process = psutil.Process(int(sign.get("process", 0)))
        if sign.get("host") == socket.gethostname() and process.ppid() == os.getppid():
            process.kill()


def _sign(path: Path, attempt: str) -> Sign:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("attempt") == attempt else {}


def _place(sign: Sign) -> str:
    if not sign:
        return ", it has not begun"
    return f", {sign['doing']} at step {sign['step']}, process {sign['process']} on {sign['host']}"
