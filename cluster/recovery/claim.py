"""One driver per run: two under one name would write over each other's checkpoints."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.driver import say
from cluster.grammar import ConfigError

LOCK = "driver.lock"
PATIENCE = 30.0
"""Seconds that a driver waits for another to end: one that was stopped a moment ago may still be saying so."""


@contextmanager
def alone(folder: Path, patience: float = PATIENCE) -> Iterator[str]:
    """Hold the run in `folder` for this process; the kernel lets go of it when the process dies, however it does. Who
    drove it before and was cut off (killed, or by an error that nobody foresaw); empty where nobody was.

    Raises ConfigError, naming the other's host and process, where another driver still holds it after `patience`
    seconds. On storage that several hosts share it needs a file system whose locks they share (NFS 4 has them).
    """
    with (folder / LOCK).open("a+") as file:
        until = time.monotonic() + patience
        told = False
        while not _taken(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() >= until:
                raise ConfigError(
                    f"run {folder.name!r} is being driven by {holder}; wait for its end, stop it, or choose another "
                    "name"
                )
            if not told:
                say(f"run {folder.name!r} is held by {holder}; waiting for up to {patience:.0f} s")
            told = True
            time.sleep(0.5)
        file.seek(0)
        cut_off = file.read().strip()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield cut_off
        except (ConfigError, KeyboardInterrupt, SystemExit):  # it says itself why it ends
            file.truncate(0)
            raise
        file.truncate(0)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
