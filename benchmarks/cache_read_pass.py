"""One timed pass over a working set, and who can make it: the memory copy, our reader, a peer."""

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.cache_read_data import Case, Stored, word_sum
from benchmarks.cache_read_peers import Peer
from data_sharding.batch import StoredTaps
from data_sharding.cache.reader import TeacherCache, Verify

RING = 3
"""Batches whose memory is in use at once, as with a loader that is two steps ahead."""


class Contestant(Protocol):
    """Reads batches of a working set into memory that the training owns."""

    name: str
    count: int
    sequential: bool
    words: np.ndarray
    """(count,) uint64: what the sums of the samples must be."""

    @property
    def folder(self) -> Path | None: ...

    def open(self) -> None: ...

    def read(self, numbers: Sequence[int], then: Sequence[int]) -> Any:
        """These samples in one batch; `then` are the next batch's."""
        ...

    def total(self, found: Any) -> np.uint64:
        """The sum of what `read` gave, over every byte."""
        ...

    def close(self) -> None: ...


class Rows:
    """A ring of batch buffers of fp16 samples, for those who bring none."""

    def __init__(self, batch: int, size: int) -> None:
        self.memory = np.zeros((RING, batch, size), np.uint8)
        self._turn = 0

    def next(self, count: int) -> np.ndarray:
        """(count, size) uint8, written over `RING` calls later."""
        self._turn += 1
        return self.memory[self._turn % RING, :count]


class Copy:
    """The limit: one thread copies the same bytes from memory to memory."""

    name, sequential, folder = "memory copy", False, None

    def __init__(self, source: np.ndarray, words: np.ndarray, rows: Rows) -> None:
        self.source, self.words, self.rows, self.count = source, words, rows, len(source)

    def open(self) -> None:
        """Nothing to open."""

    def read(self, numbers: Sequence[int], then: Sequence[int]) -> np.ndarray:
        out = self.rows.next(len(numbers))
        for row, number in zip(out, numbers, strict=True):
            np.copyto(row, self.source[number])
        return out

    def total(self, found: np.ndarray) -> np.uint64:
        return word_sum(found)

    def close(self) -> None:
        """Nothing to close."""


class Library:
    """A peer, which reads sample by sample."""

    def __init__(self, peer: Peer, words: np.ndarray, rows: Rows) -> None:
        self.peer, self.words, self.rows = peer, words, rows
        self.name, self.sequential, self.count = peer.name, peer.sequential, len(words)
        self.folder: Path | None = peer.folder

    def open(self) -> None:
        self.peer.open()

    def read(self, numbers: Sequence[int], then: Sequence[int]) -> np.ndarray:
        out = self.rows.next(len(numbers))
        for row, number in zip(out, numbers, strict=True):
            self.peer.read(number, row)
        return out

    def total(self, found: np.ndarray) -> np.uint64:
        return word_sum(found)

    def close(self) -> None:
        self.peer.close()


def names(case: Case) -> tuple[str, str, str]:
    """What our ways to read a case are called."""
    return f"{case.name} staged", f"{case.name} staged, verified", f"{case.name} ready"


class Ours:
    """The teacher cache. `staged`: rows as stored, in the batch buffer, to be decoded on the training device.
    `ready`: fp16 maps on the CPU."""

    sequential = False

    def __init__(self, stored: Stored, words: np.ndarray, *, verify: Verify, ready: bool) -> None:
        staged, verified, decoded = names(stored.case)
        self.name = decoded if ready else verified if verify == "always" else staged
        self.stored, self.words, self.ready = stored, words, ready
        self.verify: Verify = verify
        self.folder: Path | None = stored.folder
        self.count = len(stored.image_ids)
        self._cache: TeacherCache | None = None
        self._coming: Callable[[], StoredTaps] | None = None

    def open(self) -> None:
        self._cache = TeacherCache.open(self.stored.folder, self.stored.key, verify=self.verify)

    def read(self, numbers: Sequence[int], then: Sequence[int]) -> Any:
        assert self._cache is not None
        read = self._coming or self._cache.bring(numbers, [0] * len(numbers))
        self._coming = self._cache.bring(then, [0] * len(then)) if then else None
        taps = read()
        return taps.decode(torch.float16) if self.ready else taps

    def total(self, found: Any) -> np.uint64:
        if isinstance(found, StoredTaps):
            return np.sum([word_sum(tap.values.numpy()) for tap in found.pyramid], dtype=np.uint64)
        return np.sum([word_sum(level.permute(0, 2, 3, 1).numpy()) for level in found.pyramid], dtype=np.uint64)

    def close(self) -> None:
        assert self._cache is not None
        self._cache.close()
        self._cache = None


@dataclass(frozen=True)
class Pass:
    """One pass over all samples."""

    seconds: list[float]
    """Per sample, one number for each call."""
    busy: list[float]
    """The same of the reading thread's processor time, which other programs do not add to."""
    wall: float
    """Per sample, in seconds."""
    cpu: float
    """Processor time of all threads per sample, in seconds."""


def run(contestant: Contestant, seed: int, batch: int, repeat: int = 1) -> Pass:
    """Read all samples in batches, `repeat` times over. Raises ValueError where a sum is not what it must be."""
    order = np.arange(contestant.count)
    draw = np.random.Generator(np.random.Philox(seed))
    orders = [order if contestant.sequential else draw.permutation(order) for _ in range(repeat)]
    groups = [o[i : i + batch].tolist() for o in orders for i in range(0, len(order), batch)]
    in_use: deque[Any] = deque(maxlen=RING - 1)
    seconds, thread, cpu = [], [], 0.0
    for numbers, then in zip(groups, [*groups[1:], []], strict=True):
        busy, own, began = time.process_time(), time.thread_time(), time.perf_counter()
        found = contestant.read(numbers, then)
        seconds.append((time.perf_counter() - began) / len(numbers))
        thread.append((time.thread_time() - own) / len(numbers))
        cpu += time.process_time() - busy
        expected = contestant.words[numbers].sum(dtype=np.uint64)
        if contestant.total(found) != expected:
            raise ValueError(f"{contestant.name}: samples {numbers} do not add up to what was stored")
        in_use.append(found)
    samples = len(order) * repeat
    wall = sum(s * len(numbers) for s, numbers in zip(seconds, groups, strict=True))
    return Pass(seconds, thread, wall / samples, cpu / samples)


def forget(folder: Path) -> None:
    """Let the system drop the files of a folder from memory; only what nobody has mapped goes."""
    gc.collect()
    for path in (p for p in folder.glob("**/*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
