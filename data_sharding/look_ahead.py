"""Which shards of a cache the coming steps need: they are fetched ahead, and let go after their last use.

The order of an epoch is known before it begins, so nothing here guesses.
"""

from dataclasses import dataclass

import numpy as np

from data_sharding.cache.reader import TeacherCache
from data_sharding.order import Order, rank_slice, view_of
from data_sharding.world import World


@dataclass(frozen=True)
class Uses:
    """When one rank reads each shard in one epoch, in the order of first use: (M,) each."""

    shards: np.ndarray
    first: np.ndarray
    """Row of the epoch."""
    last: np.ndarray

    def earlier(self, rows: int) -> "Uses":
        """The same, counted from `rows` later."""
        return Uses(self.shards, self.first - rows, self.last - rows)


NO_USES = Uses(*(np.empty(0, np.int64),) * 3)


class LookAhead:
    """Tells a cache that is read from elsewhere what is coming."""

    def __init__(
        self,
        cache: TeacherCache,
        order: Order,
        views: int,
        world: World,
        *,
        shards: int,
        behind: int,
        groups: np.ndarray,
    ) -> None:
        """`shards`: how many to fetch ahead of their first use. `behind`: steps that may still be reading. `groups`:
        (N,) the group of each image, `views` their number per image.

        Raises ValueError where the staging folder cannot hold what this rank needs at one time.
        """
        self._cache, self._order, self._views, self._world = cache, order, views, world
        self._ahead, self._behind, self._groups = shards, behind, groups
        self._epoch: int | None = None
        self._before, self._now, self._next = NO_USES, NO_USES, NO_USES
        self._sizes = np.array([file.bytes for file in cache.files], np.int64)
        self._require_room()

    def at(self, step: int) -> None:
        """Step `step` is about to be read: fetch what follows, let go of what is over. Steps come in order."""
        epoch, row = self._order.position(step)
        if epoch != self._epoch:
            went_on = self._epoch is not None and epoch == self._epoch + 1
            self._before = self._now.earlier(self._order.steps_in(epoch - 1)) if went_on else NO_USES
            self._epoch, self._now, self._next = epoch, self._uses(epoch), self._uses(epoch + 1)
        now = self._now
        alive = now.shards[(now.first <= row) & (now.last >= row - self._behind)]
        still_read = self._before.shards[self._before.last >= row - self._behind]
        coming = np.concatenate([now.shards[now.first > row], self._next.shards])[: self._ahead]
        self._cache.keep(np.concatenate([still_read, alive, coming]).tolist())
        self._cache.expect(np.concatenate([alive, coming]).tolist())

    def _uses(self, epoch: int) -> Uses:
        rows = self._order.epoch(epoch)[:, rank_slice(self._order.batch, self._world)]
        shards = self._cache.index.shards(rows, view_of(self._groups[rows], epoch, self._views)).ravel()
        found, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        by_use = np.argsort(first)
        return Uses(found[by_use], first[by_use] // rows.shape[1], last[by_use] // rows.shape[1])

    def _require_room(self) -> None:
        uses, staging = self._uses(0), self._cache.staging
        change = np.zeros(int(uses.last.max()) + self._behind + 2, np.int64)
        np.add.at(change, uses.first, self._sizes[uses.shards])
        np.add.at(change, uses.last + self._behind + 1, -self._sizes[uses.shards])
        needed = int(change.cumsum().max()) + self._ahead * int(self._sizes.max())
        if staging is not None and needed > staging.limit:
            raise ValueError(
                f"the order of this run keeps {needed / 1e9:.3g} GB of {self._cache.folder} in use at one time on each "
                f"worker, and resources.staging_gb is {staging.limit / 1e9:.3g} for all workers of a machine; raise "
                f"it, or lower order.window (now {self._order.window}) or resources.staging_ahead (now {self._ahead})"
            )
