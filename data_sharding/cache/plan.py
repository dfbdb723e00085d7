"""Which image goes to which shard of a teacher cache, decided before a byte is written.

The plan is a pure function of (key, data set, views): the sizes of sparse samples follow from their boxes. Any number
of writers fills it, in any order, with the same bytes: also which images share a forward of the teacher is part of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_sharding.cache.foreground import foreground_rows
from data_sharding.cache.key import CacheKey

if TYPE_CHECKING:
    from data_sharding.shards import PackedDataset
    from data_sharding.views import ViewTable

ROW_OVERHEAD = 1200
"""Bytes that Arrow adds to a sample: message headers, small columns, its line in the index."""


@dataclass(frozen=True, kw_only=True)
class CacheShard:
    """One file of the cache: images of one group of the data set, in one view."""

    id: str
    """`v<view>/g<group>-<part>`; the file's name adds the hash of its content."""
    view: int
    batches: tuple[tuple[int, ...], ...]
    """Image positions of each forward of the teacher; the images of one forward share a canvas."""

    @property
    def positions(self) -> tuple[int, ...]:
        """Image positions in the order of the rows."""
        return tuple(i for batch in self.batches for i in batch)


def plan(key: CacheKey, dataset: "PackedDataset", views: "ViewTable") -> tuple[CacheShard, ...]:
    """All shards of a cache, view by view and group by group."""
    require_matching(key, dataset, views)
    return tuple(
        s
        for k in range(views.count)
        for s in _shards_of_view(
            key, k, dataset.groups, _canvases(views, dataset, k), sample_sizes(key, dataset, views, k)
        )
    )


def estimate_bytes(key: CacheKey, dataset: "PackedDataset", views: "ViewTable") -> int:
    """The size of the finished cache in bytes, Arrow's headers estimated."""
    samples = sum(int(sample_sizes(key, dataset, views, k).sum()) for k in range(views.count))
    return samples + ROW_OVERHEAD * len(dataset) * views.count


def sample_sizes(key: CacheKey, dataset: "PackedDataset", views: "ViewTable", view: int) -> np.ndarray:
    """(N,) int64: bytes of the taps of every image in a view, as the foreground of its labels makes them."""
    canvases = _canvases(views, dataset, view)
    if not key.sparse:
        return np.array([key.sample_bytes(canvas) for canvas in key.canvases], np.int64)[canvases]
    rows = foreground_rows(key, dataset, views, view).tolist()
    return np.array([key.sample_bytes(key.canvases[c], kept) for c, kept in zip(canvases, rows, strict=True)], np.int64)


def require_matching(key: CacheKey, dataset: "PackedDataset", views: "ViewTable") -> None:
    """Raise when the key was not made for this data set and these views."""
    pairs = (
        ("dataset_uid", key.dataset_uid, dataset.uid),
        ("views_uid", key.views_uid, views.uid),
        ("canvases", tuple(map(tuple, key.canvases)), tuple(map(tuple, views.buckets))),
    )
    wrong = [f"{name}: key has {has!r}, given is {given!r}" for name, has, given in pairs if has != given]
    if wrong:
        raise ValueError("the cache key does not describe these images: " + "; ".join(wrong))


def _canvases(views: "ViewTable", dataset: "PackedDataset", view: int) -> np.ndarray:
    return np.asarray(views.canvas_ids(np.full(len(dataset), view, np.int64)))


def _shards_of_view(
    key: CacheKey, view: int, groups: np.ndarray, canvases: np.ndarray, sizes: np.ndarray
) -> Iterator[CacheShard]:
    order = np.lexsort((np.arange(len(groups)), canvases, groups))
    for group in np.unique(groups):
        members = order[np.searchsorted(groups[order], group) : np.searchsorted(groups[order], group, "right")]
        batches = [
            of_canvas[i : i + key.batch]
            for c in np.unique(canvases[members])
            for of_canvas in [members[canvases[members] == c]]
            for i in range(0, len(of_canvas), key.batch)
        ]
        held = [int(sizes[batch].sum()) for batch in batches]
        for part, chosen in enumerate(_parts(batches, held, key.shard_bytes)):
            planned = tuple(tuple(batch.tolist()) for batch in chosen)
            yield CacheShard(id=f"v{view:03d}/g{int(group):05d}-{part:03d}", view=view, batches=planned)


def _parts(batches: list[np.ndarray], sizes: list[int], limit: int) -> Iterator[list[np.ndarray]]:
    """Cut a group's batches into runs of at most `limit` bytes, at least one batch each."""
    chosen: list[np.ndarray] = []
    filled = 0
    for batch, size in zip(batches, sizes, strict=True):
        if chosen and filled + size > limit:
            yield chosen
            chosen, filled = [], 0
        chosen.append(batch)
        filled += size
    if chosen:
        yield chosen
