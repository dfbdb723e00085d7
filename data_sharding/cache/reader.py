"""Reads what a teacher saw, stored by `cache.writer`, and never returns anything else.

Taps come back as they are stored (`StoredTaps`), all rows of a batch side by side, so that few bytes travel to the
training device; `StoredTaps.decode` makes maps of them there.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from data_sharding.batch import StoredTaps
from data_sharding.cache.batch import BatchCopy
from data_sharding.cache.buffers import BatchBuffers
from data_sharding.cache.index import Index
from data_sharding.cache.key import COMMAND, CacheKey, library_versions
from data_sharding.cache.mapping import MappedShard, MappedShards, ShardFile
from data_sharding.cache.opening import open_shelf, read_index, read_manifest
from data_sharding.cache.pages import Pages
from data_sharding.cache.replay import TOLERANCE, ReplayDiffers, difference, sampled
from data_sharding.cache.rows import ShardCorrupt, StoredRow
from data_sharding.remote import is_url, place_of
from data_sharding.staged_shards import StagedShards
from data_sharding.staging import Staging

Verify = Literal["first", "always", "never"]
T = TypeVar("T")
BRINGING = 2
"""Threads that bring in pages ahead of the copy, and prepare it."""
WORTH_A_THREAD = 4 * 2**20
"""Bytes of a batch from which on another thread prepares it; handing over what is smaller costs more than it spares."""


class TeacherCache:
    """A finished cache. Safe to read from several threads; each process opens its own."""

    def __init__(
        self,
        folder: Path | str,
        key: CacheKey,
        manifest: dict[str, Any],
        verify: Verify,
        open_shards: int,
        staging: Staging | None,
    ) -> None:
        """Use `open`."""
        self.folder, self.key, self.layout, self.verify = folder, key, key.layout, verify
        self.staging = staging
        names = [s["name"] for s in manifest["shards"]]
        self.files = [
            ShardFile(place_of(folder, s["name"]), s["id"], s["rows"], s["bytes"], s["xxh3_128"])
            for s in manifest["shards"]
        ]
        self.shelf = open_shelf(folder, names, self.files, staging)
        self.shards = MappedShards(self.shelf, key, limit=open_shards)
        self._healing = threading.Lock()
        self.index = Index(folder, read_index(folder, manifest["index"]), manifest["images"], manifest["views"])
        self._verified, self._replayed = (bytearray(len(self.index)) for _ in range(2))
        self._sizes = {(h, w): self.layout.sizes((h, w)) for h, w in key.canvases}
        self._number = {file.id: number for number, file in enumerate(self.files)}
        self._buffers = {pin: BatchBuffers(pin=pin) for pin in (False, True)}
        self._sample_bytes = sum(file.bytes for file in self.files) / len(self.index)
        self._pages = Pages()
        self._bringing = ThreadPoolExecutor(BRINGING, thread_name_prefix="pages")

    @classmethod
    def open(
        cls,
        folder: Path | str,
        key: CacheKey,
        *,
        verify: Verify = "first",
        open_shards: int = 1024,
        staging: Staging | None = None,
    ) -> "TeacherCache":
        """Open a finished cache that was made with exactly `key`, in a folder or, with `staging`, behind a URL.

        `verify`: check a sample's bytes on its first read in this process, on every read, or never. `open_shards`
        files stay mapped.

        Raises CacheIncomplete without a manifest, ForeignCache naming each differing setting, and ShardCorrupt for
        files that are missing, cut or longer than they were.
        """
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be first, always or never, got {verify!r}")
        if is_url(folder) and staging is None:
            raise ValueError(f"{folder} is read through copies on this machine: give `staging` a folder and a limit")
        return cls(folder, key, read_manifest(folder, key), verify, open_shards, staging)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Another process opens the same folder by itself: mappings do not travel."""
        return _reopen, (self.folder, self.key, self.verify, self.shards.limit, self.staging)

    def __len__(self) -> int:
        """The number of samples: images times views."""
        return len(self.index)

    def read(
        self, positions: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray, *, pin: bool = False
    ) -> StoredTaps:
        """The taps of image positions[i] in view views[i], encoded, on the CPU (`pin`: in page-locked memory).

        All samples must share a canvas. Raises ShardCorrupt for a sample that is not what was written; a damaged copy
        of a file that lies elsewhere is fetched again first, once.
        """
        return self._read(self.index.lines(positions, views), pin)

    def bring(
        self, positions: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray, *, pin: bool = False
    ) -> Callable[[], StoredTaps]:
        """`read`, in two steps: threads bring in the pages of these samples, where that was not asked for before, and
        prepare all that is not the copy itself. The function that comes back, to be called once, waits for them and
        copies. What lies elsewhere is fetched whole, by `expect`.
        """
        lines = self.index.lines(positions, views)
        small = len(lines) * self._sample_bytes < WORTH_A_THREAD and all(map(self._is_brought, lines))
        if small or isinstance(self.shelf, StagedShards):
            return partial(self._read, lines, pin)
        return partial(self._read_brought, lines, pin, self._bringing.submit(self._bring, lines, pin))

    def require_same_pixels(self, positions: Sequence[int], views: Sequence[int], images: Tensor) -> None:
        """Compare (B, 3, H, W) uint8 renderings at the student's resolution with what was kept of them beside the
        teacher's taps: each sample once in this process, none with `verify` never. Raises ReplayDiffers."""
        for position, view, image in zip(positions, views, images, strict=True):
            (line,) = self.index.lines([position], [view])
            if self.verify == "never" or self._replayed[line]:
                continue
            (sample,) = self._healed(lambda one=line: self._rows([one]))
            off = difference(sample.pixels, sampled(image, sample.canvas[2:])) if sample.pixels else 0.0
            if off > TOLERANCE:
                raise ReplayDiffers(
                    f"{self.folder}: view {view} of image id {sample.image_id} differs by {off:.1f} grey levels on "
                    f"average from what the teacher saw; the cache was filled with {dict(self.key.versions)}, this "
                    f"process has {dict(library_versions())}. Use the code and libraries that filled it, or delete "
                    f"this folder and fill it again with `{COMMAND}`"
                )
            self._replayed[line] = 1

    def verify_files(self) -> None:
        """Read every shard whole and compare it with its hash, as after copying a cache."""
        for shard in range(len(self.files)):
            self.shelf.take(shard).require_content()
            self.shelf.put_back(shard)

    def expect(self, shards: Sequence[int]) -> None:
        """These shards will be read soon, the first one first: fetch them, where they lie elsewhere."""
        if isinstance(self.shelf, StagedShards):
            self.shelf.expect(shards)

    def keep(self, shards: Iterable[int]) -> None:
        """Close all other shards, until they are read again."""
        self.shards.keep(set(shards))

    def close(self) -> None:
        """Let go of the mapped files, and end the threads and what fetches files."""
        self._bringing.shutdown(wait=True, cancel_futures=True)
        self.shards.close()
        if isinstance(self.shelf, StagedShards):
            self.shelf.close()

    def _healed(self, act: Callable[[], T]) -> T:
        """What `act` returns, after fetching again each damaged copy that it meets, once."""
        try:
            return act()
        except ShardCorrupt:
            with self._healing:
                while True:
                    try:
                        return act()  # another thread may have fetched it meanwhile
                    except ShardCorrupt as error:
                        if error.shard not in self._number or not self.shards.renew(self._number[error.shard]):
                            raise

    def _read(self, lines: list[int], pin: bool) -> StoredTaps:
        return self._healed(lambda: self._copied(self._prepared(lines, self._rows(lines), pin)))

    def _read_brought(self, lines: list[int], pin: bool, brought: "Future[Prepared]") -> StoredTaps:
        try:
            return self._copied(brought.result())
        except (ShardCorrupt, CancelledError):
            return self._read(lines, pin)

    def _prepared(self, lines: list[int], rows: list[StoredRow], pin: bool) -> "Prepared":
        canvas, *others = {row.canvas[:2] for row in rows}
        if others:
            found = sorted([canvas, *others])
            raise ValueError(f"a batch must have one canvas, these {len(rows)} samples have {found}")
        copy = BatchCopy(rows, self.key.groups, self._sizes[canvas], self._buffers[pin])
        return Prepared(lines, rows, copy, self.key.stored(copy.taps()))

    def _copied(self, batch: "Prepared") -> StoredTaps:
        for number, found in batch.copy.copy(self._unchecked(batch.lines)):
            self._require_checksum(batch.lines[number], batch.rows[number].checksum, found)
            self._verified[batch.lines[number]] = 1
        return batch.taps

    def _unchecked(self, lines: list[int]) -> Sequence[int]:
        """Which of these samples have to be checked as they are read."""
        if self.verify == "never":
            return ()
        every = self.verify == "always"
        return [number for number, line in enumerate(lines) if every or not self._verified[line]]

    def _rows(self, lines: list[int]) -> list[StoredRow]:
        """What is short in these samples, and where the rest is mapped."""
        open_shards: dict[int, MappedShard] = {}
        rows = []
        for line in lines:
            shard, row, image_id, view = self.index.places[line]
            mapped = open_shards.get(shard)
            if mapped is None:
                mapped = open_shards[shard] = self.shards.shard(shard)
            rows.append(mapped.row(row, (image_id, view)))
        return rows

    def _require_checksum(self, line: int, stored: int, found: int) -> None:
        expected = self.index.checksum(line)
        if not expected == stored == found:
            shard, row, image_id, view = self.index.places[line]
            file, got = self.files[shard], f"{found:016x} (the row says {stored:016x})"
            raise ShardCorrupt(file.path, file.id, row, (image_id, view), f"xxh3_64 {expected:016x}", got)

    def _bring(self, lines: list[int], pin: bool) -> "Prepared":
        rows = self._rows(lines)
        for line, row in zip(lines, rows, strict=True):
            shard, number, _, _ = self.index.places[line]
            mapped = self.shards.mapped(shard)
            if mapped is not None and not mapped.brought[number]:
                mapped.brought[number] = 1
                self._pages.bring(row.values)
        return self._prepared(lines, rows, pin)

    def _is_brought(self, line: int) -> bool:
        shard, row, _, _ = self.index.places[line]
        mapped = self.shards.mapped(shard)
        return mapped is not None and bool(mapped.brought[row])


@dataclass(frozen=True)
class Prepared:
    """A batch that wants nothing but the copy of its bytes."""

    lines: list[int]
    rows: list[StoredRow]
    copy: BatchCopy
    taps: StoredTaps
    """Over memory that `copy` fills."""


def _reopen(
    folder: Path | str, key: CacheKey, verify: Verify, open_shards: int, staging: Staging | None
) -> TeacherCache:
    return TeacherCache.open(folder, key, verify=verify, open_shards=open_shards, staging=staging)
