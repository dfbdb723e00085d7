"""Ray Train's controller tells which workers were lost. Imported by the driver alone: it loads Ray Train."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from cluster.grammar import ConfigError
from cluster.recovery.incidents import note

LONGEST = 160
"""Characters of an error that are told."""
AGAIN = 5.0
"""Seconds within which the same is not told again: while Ray Train waits for a node to go it tells at every look."""
SILENT = "WorkerHealthCheckTimeoutError"
"""The name of Ray Train's error of a worker that has not answered for long; its class is not public."""


class NoteLostWorkers(UserCallback):
    """Runs in the controller, on whatever node that is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told, self._last = "", -AGAIN

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """One row for all that failed at one time."""
        what, before = describe(worker_exceptions), self._last
        self._last = time.monotonic()
        if what != self._told or self._last - before >= AGAIN:
            self._told = what
            note(self._folder, what=what, ranks=sorted(worker_exceptions))


def head_lost(error: BaseException) -> ConfigError | None:
    """What to tell where the driver itself lost whom it waits for: Ray Train's controller, which is beside it, most
    likely with the head. (Who loses a worker is the controller, which starts another.)"""
    if not isinstance(error, RayActorError):
        return None
    told = " ".join(str(error).split())[:LONGEST]
    return ConfigError(
        f"the cluster's head is gone, or what led the run there ({told}); when it is back, the same command goes on "
        "from the newest checkpoint"
    )


def describe(failures: Mapping[int, Exception]) -> str:
    """Who was lost, and how; where nobody is known to be, what the first one's error says."""
    lost = {rank: how for rank, error in sorted(failures.items()) if (how := _lost(error))}
    if lost:
        return "; ".join(f"rank {rank} {how}" for rank, how in lost.items())
    rank, error = min(failures.items())
    text = " ".join(str(getattr(error, "_base_exc", None) or error).split())
    if "gloo" in text and (peer := re.search(r"\[([0-9a-f.:]+)\]:\d+", text)):
        # Ray has not heard of it yet: whoever lives is the first to notice.
        return f"rank {rank} lost the connection to a rank on {peer[1]}"
    return f"rank {rank} failed: {text[:LONGEST]}"


def _lost(error: Exception) -> str:
    """How a worker was lost; empty where it lives and only raised something."""
    if type(error).__name__ == SILENT:
        return "does not answer"
    died = getattr(error, "health_check_failure", error)
    if not isinstance(died, RayActorError):
        return ""
    told = str(died)
    place = re.search(r"\bip: (\S+)", told)
    where = f" on {place[1]}" if place else ""
    return f"was lost with its node{where}" if "node has died" in told else f"died{where}"
