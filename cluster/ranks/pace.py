"""What every rank does with its time, step by step, and now and then told by all to all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from data_sharding.world import World

SECTIONS = ("teacher", "student", "assistant", "optimizer")
NUMBERS = ("step", *SECTIONS, "data", "communication")
"""Seconds per step that a rank tells of itself; sections hold the collectives that are called inside them."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one rank did in a window: seconds per step, and the most bytes that it has held."""

    step: float
    parts: Mapping[str, float]
    """By name of `SECTIONS`."""
    data: float
    """Waiting for the loader."""
    communication: float
    """In collectives, most of it waiting for other ranks."""
    memory: float

    @property
    def own(self) -> float:
        """The time that it would need without the others."""
        return self.step - self.communication

    def metrics(self, rank: int, images: float) -> dict[str, float]:
        """For the log; `images` of a step are this rank's."""
        seconds = {"step": self.step, "own": self.own, "data": self.data, "communication": self.communication}
        found = {f"{name}_s": value for name, value in (seconds | dict(self.parts)).items()}
        found |= {"images_per_s": images / self.step, "communication_share": self.communication / self.step}
        return {f"ranks/{name}/{rank}": value for name, value in (found | {"memory_bytes": self.memory}).items()}


class Pace:
    """One rank's view of a window of steps, and every so many steps all ranks' views."""

    def __init__(self, world: World, device: torch.device, every: int) -> None:
        """`every`: steps of a window; 0: never tell."""
        self._world, self._device = world, device
        self._every = every if world.size > 1 else 0
        self._sums, self._steps = dict.fromkeys(NUMBERS, 0.0), 0

    def see(self, step: int, seconds: Mapping[str, float], memory: Callable[[], float]) -> list[Load]:
        """Count a step that took these seconds by name of `NUMBERS` (others are ignored). With the last step of a
        window what every rank did in it, on every rank; else nothing. All ranks call it for the same steps.
        `memory`: asked at the end of a window."""
        if not self._every:
            return []
        for name in NUMBERS:
            self._sums[name] += seconds.get(name, 0.0)
        self._steps += 1
        if (step + 1) % self._every:
            return []
        mine = [self._sums[name] / self._steps for name in NUMBERS]
        self._sums, self._steps = dict.fromkeys(NUMBERS, 0.0), 0
        return self._exchanged([*mine, memory()])

    def _exchanged(self, mine: list[float]) -> list[Load]:
        """One small sum over ranks: each fills its own row."""
        rows = torch.zeros(self._world.size, len(mine), dtype=torch.float64, device=self._device)
        rows[self._world.rank] = torch.tensor(mine, dtype=torch.float64)
        return [_load(row) for row in self._world.sum(rows).tolist()]


def _load(row: Sequence[float]) -> Load:
    found = dict(zip(NUMBERS, row, strict=False))
    return Load(
        step=found["step"],
        parts={name: found[name] for name in SECTIONS},
        data=found["data"],
        communication=found["communication"],
        memory=row[-1],
    )
