"""What the cluster gains and loses while a run trains: more workers at a checkpoint, or one more checkpoint."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.sections import ResourcesConfig
from data_sharding.world import World

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


class Nodes:
    """The nodes of the cluster as rank 0 saw them when the workers started."""

    def __init__(self, resources: ResourcesConfig, world: World, gpu: bool) -> None:
        self._world = world
        self._may_grow = world.size < resources.most_workers
        self._each = {"CPU": float(resources.threads)} | ({"GPU": 1.0} if gpu else {})
        self._then = _alive() if self._may_grow and world.rank == 0 else set()

    def room_for_more(self) -> bool:
        """Whether a node has joined since, and a worker more fits. All ranks call it and get the same."""
        if not self._may_grow:
            return False
        found = self._world.rank == 0 and bool(_alive() - self._then) and fits(_free(), self._each)
        return bool(self._world.gather(found)[0])


def fits(free: Mapping[str, float], each: Mapping[str, float]) -> bool:
    """Whether `free` holds what a worker takes."""
    return all(free.get(kind, 0.0) >= amount for kind, amount in each.items())


class Notice:
    """Whether a node of this run is about to be taken away."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._known: frozenset[str] = frozenset()

    def look(self, done: int) -> str:
        """After `done` steps: what is new, in words; mostly nothing. All ranks call it equally often."""
        if done % self._every or os.environ.get(WATCHER) == "0":
            return ""
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None or self._known.issuperset(info.preempted_node_ids):
            return ""
        self._known |= set(info.preempted_node_ids)
        return told(info.preempted_ranks, info.deadline_ms, time.time())


def told(ranks: Iterable[int], deadline_ms: int | None, now: float) -> str:
    """Who is to go, and when."""
    when = "soon" if deadline_ms is None else f"in {max(0.0, deadline_ms / 1000 - now):.0f} s"
    return f"the node of rank {', '.join(map(str, ranks))} is to be taken away {when}"


def _alive() -> set[str]:
    import ray

    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def _free() -> dict[str, Any]:
    import ray

    return ray.available_resources()
