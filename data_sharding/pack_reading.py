"""The records of a source in packing order, read and checked by threads a little ahead of the writer.

Finding a truncated image means reading its pixels, which takes longer than packing it; decoders leave the
interpreter's lock, so that this happens beside the writing.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from data_sharding.datasets.base import Source
from data_sharding.prefetch import Prefetched
from data_sharding.problems import BadImage
from data_sharding.record import Record

THREADS = min(8, os.cpu_count() or 1)
AHEAD = 2 * THREADS
"""Images that are read before they are needed."""


class RecordReader:
    """One pass over a source, from a place in its order. The next record can be looked at before it is taken."""

    def __init__(self, source: Source, order: np.ndarray, num_classes: int, pool: ThreadPoolExecutor) -> None:
        self._source, self._order, self._num_classes, self._pool = source, order, num_classes, pool
        self.at = 0
        """How many places of the order are behind it."""
        self._seek(0)

    def seek(self, place: int) -> None:
        """Go on from a place in the order; nothing is read twice where it stands there already."""
        if place != self.at:
            self._seek(place)

    def peek(self) -> Record | BadImage | None:
        """What comes next; None at the end."""
        if self._next is None:
            self._next = next(self._results, None)
        return self._next

    def take(self) -> None:
        """Leave what `peek` showed behind."""
        self._next = None
        self.at += 1

    def _seek(self, place: int) -> None:
        self.at, self._next = place, None
        self._results = Prefetched(self._started(place), AHEAD)

    def _started(self, place: int) -> Iterator[Callable[[], Record | BadImage]]:
        for position in self._order[place:].tolist():
            yield self._pool.submit(partial(self._read, position)).result

    def _read(self, position: int) -> Record | BadImage:
        try:
            record = self._source.read(position)
        except BadImage as error:
            return error
        labels, count = record.labels, self._num_classes
        if len(labels) and not 0 <= labels.min() <= labels.max() < count:
            raise ValueError(f"{record.file_name}: labels {labels.tolist()} outside [0, {count})")
        return record
