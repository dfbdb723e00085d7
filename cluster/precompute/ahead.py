"""A teacher that works without a pause: the next batch is rendered, and the last one encoded and written, meanwhile.

The teacher stays in the thread that calls (there memory that it frees is at once its own again; glibc gives large
blocks of other threads back to the system); others render, and one writes. They wait for each other in both
directions, so that memory stays bounded whatever is slow.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Full, Queue

import numpy as np
import torch

from cluster.precompute.batches import Assembled
from data_sharding.batch import Batch, Taps
from data_sharding.cache.plan import CacheShard
from data_sharding.cache.writer import CacheWriter, Seen
from data_sharding.prefetch import Prefetched

DEPTH = 2
"""Batches that may be rendered and not looked at, and that may be looked at and not written."""
NICER = 10
"""How far below the teacher's the helpers' priority is, in Unix's steps; 19 is the end (Ray's workers begin at 15). The
lowest of all would starve the writer, and the teacher with it, wherever other programs keep the cores busy."""
PATIENCE = 0.1
"""Seconds between two looks at whether the writer is still at work."""


class AheadOfWriting:
    """Fills shards with a teacher that is never kept waiting by pixels or disks, as long as these keep up."""

    def __init__(self, assembled: Assembled, look: Callable[[Batch], Taps], device: torch.device) -> None:
        self._assembled, self._look, self._device = assembled, look, device
        self._writer = ThreadPoolExecutor(1, "writer", give_way)

    def fill(self, writer: CacheWriter, shards: Sequence[CacheShard]) -> None:
        """Write these shards, in this order; the teacher looks in this thread. What goes wrong in any thread is raised
        here."""
        planned = [(batch, shard.view) for shard in shards for batch in shard.batches]
        seen: Queue[Seen | BaseException] = Queue(DEPTH)
        written = self._writer.submit(_write, writer, shards, iter(planned), seen)
        try:
            starts = (self._assembled.start(np.array(batch, np.int64), view) for batch, view in planned)
            for batch in Prefetched(starts, DEPTH):
                _hand_over(self._seen(batch), seen, written)
        except BaseException as error:
            _hand_over(error, seen, written)
            wait([written])
            raise
        written.result()

    def close(self) -> None:
        """End the writer's thread."""
        self._writer.shutdown(cancel_futures=True)

    def _seen(self, batch: Batch) -> Seen:
        taps = self._look(batch.to(self._device))
        c5 = None if taps.c5 is None else taps.c5.cpu()
        return Seen(Taps(c5, tuple(level.cpu() for level in taps.pyramid)), batch.images)


def _write(
    writer: CacheWriter,
    shards: Sequence[CacheShard],
    planned: Iterator[tuple[tuple[int, ...], int]],
    seen: "Queue[Seen | BaseException]",
) -> None:
    """In the writer's thread: take what the teacher saw, batch by batch."""

    def taken(positions: np.ndarray, view: int) -> Seen:
        found, looked_at = seen.get(), next(planned)
        if isinstance(found, BaseException):
            raise found
        if looked_at != (tuple(positions.tolist()), view):
            raise RuntimeError(f"the teacher has looked at {looked_at}, to be written is {positions.tolist(), view}")
        return found

    for shard in shards:
        writer.fill(shard, taken)


def _hand_over(found: Seen | BaseException, seen: "Queue[Seen | BaseException]", written: Future[None]) -> None:
    """Wait for room; where the writer has given up meanwhile, raise why."""
    while True:
        try:
            seen.put(found, timeout=PATIENCE)
            return
        except Full:
            if written.done():
                written.result()
                raise RuntimeError("the writer ended before the teacher did") from None


def give_way() -> None:
    """Let this thread run only where the teacher leaves a core some time: on Linux threads have a priority each."""
    own = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + NICER))
