"""A checkpoint is written where there is room for it, and waited for where there is none: a run never goes further
than it can be continued from."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster.grammar import ConfigError
from cluster.recovery.incidents import note, set_aside
from data_sharding.world import World

MARGIN = 1 << 20
"""Bytes beside a checkpoint: the metrics' rows, Ray Train's list."""
EVERY = 1.0
"""Seconds between two looks."""


def has_room(folder: Path, needed: int) -> bool:
    """Whether `needed` bytes can be written into `folder`: they are asked for and given back, as what a disk says is
    free may not be what a quota allows."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: nothing is left of it after a kill
            os.posix_fallocate(file.fileno(), 0, max(1, needed))
    except OSError:
        return False
    return True


def wait_for_room(
    folder: Path,
    needed: int,
    world: World,
    *,
    what: str,
    ready: Callable[[], bool] = lambda: True,
    patience: float,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Return, on all ranks, once `folder` takes `needed` bytes and rank 0 is `ready`. ConfigError on all of them after
    `patience` seconds. `alive` is called now and then."""
    began = time.monotonic()
    told = False
    while True:
        enough = bool(world.gather(world.rank != 0 or (has_room(folder, needed + MARGIN) and ready()))[0])
        late = bool(world.gather(time.monotonic() - began > patience)[0])
        if enough or late:
            break
        if not told and world.rank == 0:
            note(folder, now=f"{_short(folder, needed, what)}; waiting for up to {patience / 60:.0f} minutes")
        told = True
        alive()
        time.sleep(EVERY)
    if not enough:
        raise ConfigError(f"{_short(folder, needed, what)}; free some and give the same command again")
    if told and world.rank == 0:
        set_aside(folder)
        note(folder, now=f"there is room for {what} again, after {time.monotonic() - began:.0f} s; nothing is lost")


def _short(folder: Path, needed: int, what: str) -> str:
    return f"no room for {what} ({needed / 1e6:.1f} MB) in {folder}"
