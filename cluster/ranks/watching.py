"""What a worker tells of all workers: its own times, now and then everybody's, and who is slow."""

import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from cluster.ranks.memory import peak_bytes
from cluster.ranks.pace import Pace
from cluster.ranks.slow import SlowRanks
from cluster.ranks.traffic import Traffic
from cluster.recovery import incidents
from data_sharding.world import World


class Watch:
    """One rank's; all ranks make it together."""

    def __init__(
        self, world: World, device: torch.device, every: int, folder: Path, kept: object | None = None
    ) -> None:
        """`every`: steps between two looks at all ranks, 0: none. `folder`: the run's. `kept`: as for `Traffic`."""
        self._world, self._device, self._folder, self._kept = world, device, folder, kept
        self._traffic = Traffic(device)
        self._pace = Pace(world, device, every)
        self._slow = SlowRanks([str(host) for host in world.gather(socket.gethostname())])

    def counted(self) -> AbstractContextManager[None]:
        """The collectives of a step belong inside."""
        return self._traffic.counted(self._kept)

    def communication(self) -> float:
        """Seconds in the collectives counted since the last call."""
        return self._traffic.read()

    def see(self, step: int, seconds: Mapping[str, float], images: int) -> dict[str, float]:
        """After a step: what there is to log of all ranks, most often nothing. `seconds`: see `Pace.see`; `images` of
        the global batch. A slow rank is noted by rank 0."""
        loads = self._pace.see(step, seconds, lambda: float(peak_bytes(self._device) or 0))
        for line in self._slow.see(step + 1, loads) if self._world.rank == 0 else ():
            incidents.note(self._folder, now=line)
        told = [load.metrics(rank, images / self._world.size) for rank, load in enumerate(loads)]
        return {name: value for metrics in told for name, value in metrics.items()}
