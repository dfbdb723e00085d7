"""Which rank holds the others up.

In a step all ranks wait for the slowest, so that their steps take equally long: what tells them apart is the time
that is a rank's own, the step without collectives, where it waits for others.
"""

import statistics
from collections.abc import Sequence

from cluster.ranks.pace import Load

SLOW = 1.3
"""A rank is slow in a window where its own time is this many times the others' median, ..."""
WINDOWS = 3
"""... and it is named after so many windows on end."""


class SlowRanks:
    """Names a rank that was slow for several windows on end, once, and once more when it keeps up again."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """`hosts`: where each rank runs."""
        self._hosts = hosts
        self._windows = [0] * len(hosts)

    def see(self, step: int, loads: Sequence[Load]) -> list[str]:
        """What is to be said after the window that ended before `step`."""
        return [line for rank in range(len(loads)) for line in self._judged(step, rank, loads)]

    def _judged(self, step: int, rank: int, loads: Sequence[Load]) -> list[str]:
        mine, others = loads[rank], [load for i, load in enumerate(loads) if i != rank]
        usual = statistics.median(load.own for load in others)
        before = self._windows[rank]
        self._windows[rank] = before + 1 if mine.own > SLOW * usual else 0
        who = f"step {step}: rank {rank} on {self._hosts[rank]}"
        if self._windows[rank] == WINDOWS:
            waits = statistics.median(load.data for load in others)
            stalled = mine.data - waits > (mine.own - usual) / 2
            why = "its data come late: look at its disk and network" if stalled else "look at its processor or GPU"
            return [
                f"{who} holds the others up: {mine.own:.3g} s of its own per step, the others {usual:.3g} s (median); "
                f"it waits {mine.data:.3g} s for data, they {waits:.3g} s: {why}"
            ]
        if before >= WINDOWS and not self._windows[rank]:
            return [f"{who} keeps up again: {mine.own:.3g} s of its own per step, the others {usual:.3g} s"]
        return []
