"""A teacher that works without a pause: the next batch is rendered, and the last one encoded and written, meanwhile.

Three kinds of threads share a machine: the teacher's own, those that render, and the one that writes. They wait for
each other in both directions, so that memory stays bounded whatever is slow.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from cluster.batches import Assembled
from data_sharding.batch import Batch, Taps
from data_sharding.cache_plan import CacheShard
from data_sharding.cache_writer import CacheWriter, Seen
from data_sharding.prefetch import Prefetched

DEPTH = 2
"""Batches between rendering and writing: one that the teacher looks at, one on either side of it."""
NICE = 19
"""The lowest priority: Ray's workers begin at 15."""


class AheadOfWriting:
    """Fills shards with a teacher that is never kept waiting by pixels or disks, as long as these keep up."""

    def __init__(self, assembled: Assembled, look: Callable[[Batch], Taps], device: torch.device, threads: int) -> None:
        """`threads`: torch's threads of the teacher, on which rounding may depend."""
        self._assembled, self._look, self._device = assembled, look, device
        self._teacher = ThreadPoolExecutor(1, "teacher", torch.set_num_threads, (threads,))
        self._writer = ThreadPoolExecutor(1, "writer", give_way)

    def fill(self, writer: CacheWriter, shards: Sequence[CacheShard]) -> None:
        """Write these shards, in this order. What goes wrong in any thread is raised here."""
        self._writer.submit(self._write, writer, shards).result()

    def close(self) -> None:
        """End the threads."""
        self._writer.shutdown(cancel_futures=True)
        self._teacher.shutdown(cancel_futures=True)

    def _write(self, writer: CacheWriter, shards: Sequence[CacheShard]) -> None:
        seen = Prefetched(self._started((batch, shard.view) for shard in shards for batch in shard.batches), DEPTH)

        def taken(positions: np.ndarray, view: int) -> Seen:
            planned, found = next(seen)
            if planned != (tuple(positions.tolist()), view):
                raise RuntimeError(f"the teacher has looked at {planned}, to be written is {positions.tolist(), view}")
            return found

        for shard in shards:
            writer.fill(shard, taken)

    def _started(
        self, planned: Iterable[tuple[tuple[int, ...], int]]
    ) -> Iterator[Callable[[], tuple[tuple[tuple[int, ...], int], Seen]]]:
        for batch, view in planned:
            rendered = self._assembled.start(np.array(batch, np.int64), view)
            looked = self._teacher.submit(self._seen, rendered)
            yield lambda plan=(batch, view), looked=looked: (plan, looked.result())

    def _seen(self, rendered: Callable[[], Batch]) -> Seen:
        batch = rendered()
        taps = self._look(batch.to(self._device))
        c5 = None if taps.c5 is None else taps.c5.cpu()
        return Seen(Taps(c5, tuple(level.cpu() for level in taps.pyramid)), batch.images)


def give_way() -> None:
    """Let this thread run only where the teacher leaves a core some time: on Linux threads have a priority each."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
