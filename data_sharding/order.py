"""The order of samples: a pure function of (index, seed, epoch).

No generator state, worker count or world size enters it, so the sequence of global batches is the same for any
number of ranks, and a run resumes from the number of its step alone.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from data_sharding.world import World


def generator(seed: int, purpose: str, *position: int) -> np.random.Philox:
    """Random bits keyed by (seed, purpose, position): hashed, so that (1, 2) and (2, 1) are unrelated.

    numpy promises the bits of a Philox stream for all its versions, unlike those of `Generator.permutation`.
    """
    text = "/".join([str(seed), purpose, *map(str, position)])
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


def group_hash(groups: np.ndarray) -> np.ndarray:
    """splitmix64 of each group number, (N,) uint64: the same group starts at the same view in every run."""
    h = groups.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def view_of(groups: np.ndarray, epoch: int, count: int) -> np.ndarray:
    """The view index of each image in an epoch, (N,) int64: every view once in `count` epochs.

    It depends on the group, not on the image, so that an epoch reads whole shards of the teacher cache.
    """
    if count < 1:
        raise ValueError(f"expected at least one view per image, got {count}")
    return ((group_hash(np.asarray(groups)) % np.uint64(count)).astype(np.int64) + epoch) % count


def rank_slice(batch: int, world: World) -> slice:
    """Which samples of a global batch this rank takes: contiguous, for any number of ranks."""
    return slice(batch * world.rank // world.size, batch * (world.rank + 1) // world.size)


class Order:
    """The global batches of a run; every batch holds images of one canvas.

    Shards are permuted and samples are shuffled within windows of shards: a line. Per canvas it is cut into `lanes`
    equal parts, and a batch takes as many samples from each, lane after lane. Ranks take neighbouring parts of a batch,
    so each reads the shards of its own lanes, a part of all. A canvas's short last batch is completed from the start
    of its line, so every image is seen at least once an epoch.
    """

    def __init__(
        self,
        groups: np.ndarray,
        canvas_ids: Callable[[int], np.ndarray],
        *,
        seed: int,
        batch: int,
        window: int = 16,
        lanes: int = 1,
    ) -> None:
        """`groups`: (N,) shard number of each image. `canvas_ids(epoch)`: (N,) canvas number of each image then.

        `window` and `lanes` are settings of the run, not of its machines: the sequence depends on them.
        """
        if len(groups) == 0:
            raise ValueError("cannot order a data set without images")
        if batch < 1 or window < 1:
            raise ValueError(f"expected a global batch and a window of at least 1, got {batch} and {window}")
        if lanes < 1 or batch % lanes:
            raise ValueError(f"a global batch is shared evenly by the lanes: {lanes} lanes do not divide {batch}")
        self.groups = np.unique(groups, return_inverse=True)[1].astype(np.int64)
        self.canvas_ids = canvas_ids
        self.seed, self.batch, self.window, self.lanes = seed, batch, window, lanes
        self._first_step = [0]
        self._last: tuple[int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """All global batches of an epoch: (steps, batch) int64 image positions, one canvas per row."""
        last = self._last
        if last is None or last[0] != epoch:
            last = self._last = (epoch, self._plan(epoch))
        return last[1]

    def steps_in(self, epoch: int) -> int:
        """The number of global batches of an epoch; it can differ between epochs when canvases depend on views."""
        return int(self._batches_per_canvas(self._canvases(epoch)).sum())

    def position(self, step: int) -> tuple[int, int]:
        """The (epoch, row) of a global step of the run."""
        if step < 0:
            raise ValueError(f"expected a step of at least 0, got {step}")
        while self._first_step[-1] <= step:
            self._first_step.append(self._first_step[-1] + self.steps_in(len(self._first_step) - 1))
        epoch = int(np.searchsorted(self._first_step, step, "right")) - 1
        return epoch, step - self._first_step[epoch]

    def step_of(self, epoch: int) -> int:
        """The first global step of an epoch."""
        while len(self._first_step) <= epoch:
            self._first_step.append(self._first_step[-1] + self.steps_in(len(self._first_step) - 1))
        return self._first_step[epoch]

    def global_batch(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a global step and its (batch,) image positions."""
        epoch, row = self.position(step)
        return epoch, self.epoch(epoch)[row]

    def rank_rows(self, row: np.ndarray, world: World) -> np.ndarray:
        """This rank's part of a global batch."""
        return row[rank_slice(len(row), world)]

    def _canvases(self, epoch: int) -> np.ndarray:
        canvases = np.asarray(self.canvas_ids(epoch))
        if canvases.shape != self.groups.shape:
            raise ValueError(f"epoch {epoch}: expected {len(self.groups)} canvas ids, got shape {canvases.shape}")
        return canvases

    def _batches_per_canvas(self, canvases: np.ndarray) -> np.ndarray:
        return -(-np.bincount(canvases) // self.batch)

    def _plan(self, epoch: int) -> np.ndarray:
        canvases = self._canvases(epoch)
        steps = self._batches_per_canvas(canvases)
        samples = self._shuffled(epoch)
        # A stable sort of small numbers is one pass; picking each canvas by itself would be one pass per canvas.
        by_canvas = samples[np.argsort(canvases.astype(np.min_scalar_type(len(steps)))[samples], kind="stable")]
        lines = np.split(by_canvas, np.bincount(canvases).cumsum()[:-1])
        rows = [self._batches(line, int(n)) for line, n in zip(lines, steps, strict=True) if n]
        # Only the turns of the canvases are drawn: each canvas keeps its own order, hence its windows of shards.
        turns = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        turns = turns[_permutation(generator(self.seed, "canvas turns", epoch), len(turns))]
        return np.concatenate(rows)[np.argsort(np.argsort(turns, kind="stable"), kind="stable")]

    def _batches(self, line: np.ndarray, steps: int) -> np.ndarray:
        """The line of one canvas, completed, as (steps, batch): each lane runs through its own stretch of it."""
        by_lane = np.resize(line, (self.lanes, steps, self.batch // self.lanes))
        return by_lane.swapaxes(0, 1).reshape(steps, self.batch)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All samples, shuffled within windows of permuted shards; the first window is shorter by chance."""
        count = int(self.groups.max()) + 1
        bits = generator(self.seed, "shards", epoch)
        shift = int(bits.random_raw() % self.window)
        place = np.empty(count, np.int64)
        place[_permutation(bits, count)] = np.arange(count)
        window_of_shard = (place + shift) // self.window
        return _permutation(
            generator(self.seed, "samples", epoch), len(self.groups), first_by=window_of_shard[self.groups]
        )


def _permutation(bits: np.random.Philox, count: int, first_by: np.ndarray | None = None) -> np.ndarray:
    """A random permutation of `count` numbers, ordered by `first_by` first: (count,) int64.

    Key, random bits and number share one 64-bit word, so a plain sort decides it, equally on every machine.
    """
    keys = np.zeros(count, np.uint64) if first_by is None else first_by.astype(np.uint64)
    low = max(count - 1, 1).bit_length()
    high = int(keys.max(initial=0)).bit_length()
    if high + low > 40:
        raise ValueError(f"{count} samples in {int(keys.max(initial=0)) + 1} windows leave under 24 bits of randomness")
    drawn = bits.random_raw(count) >> np.uint64(high + low)
    word = drawn << np.uint64(low) | np.arange(count, dtype=np.uint64)
    if high:
        word |= keys << np.uint64(64 - high)
    word.sort()
    return (word & np.uint64((1 << low) - 1)).astype(np.int64)
