"""How a run keeps what it has reached and goes on from it, whoever died in between."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import results
from cluster.metric_log import MetricLog
from cluster.recovery import checkpoints, incidents, whole
from cluster.recovery.pulse import Pulse
from cluster.recovery.room import wait_for_room
from cluster.sections import ResourcesConfig
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.engine import Engine
from kd.optimise import Ema


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Writes and reads the checkpoints of one rank's run, together with all others."""

    folder: Path
    """The run's."""
    resources: ResourcesConfig
    world: World
    engine: Engine
    assistants: Mapping[str, AssistantTrainer]
    ema: Ema | None
    pulse: Pulse

    def save(self, step: int, log: MetricLog | None) -> None:
        """Save after `step` steps, whose rows of metrics are on disk before. Waits for room."""
        import ray.train

        with self.pulse.doing("saving"), tempfile.TemporaryDirectory(prefix="minnow_") as local:
            checkpoints.save(Path(local), step=step, **self._state())
            mine = whole.seal(Path(local), self.world.rank)
            wait_for_room(
                self.folder,
                sum(size for size in self.world.gather(mine) if isinstance(size, int)),
                self.world,
                what=f"the checkpoint of step {step}",
                ready=lambda: log is None or _synced(log),
                patience=self.resources.wait_for_room,
                alive=self.pulse.moved,
            )
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(local))

    def resume(self) -> tuple[int, int]:
        """Load the newest whole checkpoint; its steps, and how many workers wrote it. Ray Train's own list may lack the
        newest one, and may name one that a kill cut."""
        found = whole.newest(self.folder / results.TRAIN) if self.world.rank == 0 else (None, [])
        for told in found[1]:
            incidents.note(self.folder, what=f"a checkpoint is not whole and passed over ({told})")
        chosen = self.world.gather(found[0])[0]
        chosen = chosen if isinstance(chosen, Path) else self.resources.begin
        if chosen is None:
            return 0, self.world.size
        return checkpoints.load(chosen, **self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "assistants": self.assistants,
            "ema": self.ema,
            "world": self.world,
            "facts": {"zero": self.resources.zero},
        }


def _synced(log: MetricLog) -> bool:
    """Whether all rows are on disk."""
    try:
        log.sync()
    except OSError:
        return False
    return True
