"""Reads what a teacher saw, stored by `cache_writer`, and never returns anything else.

Taps come back as they are stored (`StoredTaps`), all rows of a batch side by side, so that few bytes travel to the
training device; `StoredTaps.decode` makes maps of them there.
"""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data_sharding.batch import StoredTaps
from data_sharding.cache_key import COMMAND, CacheKey, library_versions
from data_sharding.cache_mapping import MappedShards, ShardFile
from data_sharding.cache_opening import open_shelf, read_index, read_manifest
from data_sharding.cache_rows import CachedSample, ShardCorrupt, read_row
from data_sharding.codecs import StoredTap, stack
from data_sharding.remote import is_url, place_of
from data_sharding.replay import TOLERANCE, ReplayDiffers, difference, sampled
from data_sharding.staged_shards import StagedShards
from data_sharding.staging import Staging

Verify = Literal["first", "always", "never"]


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
        self.shards = MappedShards(self.shelf, limit=open_shards)
        self._healing = threading.Lock()
        self._index = read_index(folder, manifest["index"])
        self._line = np.full((manifest["views"], manifest["images"]), -1, np.int64)
        self._line[self._index["view"], self._index["position"]] = np.arange(len(self._index["row"]))
        self._verified, self._replayed = np.zeros((2, len(self._index["row"])), np.bool_)

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
        return len(self._verified)

    def read(
        self, positions: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray, *, pin: bool = False
    ) -> StoredTaps:
        """The taps of image positions[i] in view views[i], encoded, on the CPU (`pin`: in page-locked memory).

        All samples must share a canvas. Raises ShardCorrupt for a sample that is not what was written.
        """
        samples = [self._sample(int(i), int(k)) for i, k in zip(positions, views, strict=True)]
        canvases = {s.canvas[:2] for s in samples}
        if len(canvases) != 1:
            raise ValueError(f"a batch must have one canvas, these {len(samples)} samples have {sorted(canvases)}")
        sizes = self.layout.sizes(next(iter(canvases)))
        return self.layout.stored(tuple(self._stack(samples, n, size, pin) for n, size in enumerate(sizes)))

    def require_same_pixels(self, positions: Sequence[int], views: Sequence[int], images: Tensor) -> None:
        """Compare (B, 3, H, W) uint8 renderings at the student's resolution with what was kept of them beside the
        teacher's taps: each sample once in this process, none with `verify` never. Raises ReplayDiffers."""
        for position, view, image in zip(positions, views, images, strict=True):
            line = int(self._line[view, position])
            if self.verify == "never" or self._replayed[line]:
                continue
            sample = self._sample(position, view)
            off = difference(sample.pixels, sampled(image, sample.canvas[2:])) if sample.pixels else 0.0
            if off > TOLERANCE:
                raise ReplayDiffers(
                    f"{self.folder}: view {view} of image id {sample.image_id} differs by {off:.1f} grey levels on "
                    f"average from what the teacher saw; the cache was filled with {dict(self.key.versions)}, this "
                    f"process has {dict(library_versions())}. Use the code and libraries that filled it, or delete "
                    f"this folder and fill it again with `{COMMAND}`"
                )
            self._replayed[line] = True

    def verify_files(self) -> None:
        """Read every shard whole and compare it with its hash, as after copying a cache."""
        for shard in range(len(self.files)):
            self.shelf.take(shard).require_content()
            self.shelf.put_back(shard)

    def shards_of(self, positions: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each sample, in the shape of the arguments."""
        return self._index["shard"][self._line[views, positions]]

    def expect(self, shards: Sequence[int]) -> None:
        """These shards will be read soon, the first one first: fetch them, where they lie elsewhere."""
        if isinstance(self.shelf, StagedShards):
            self.shelf.expect(shards)

    def keep(self, shards: Iterable[int]) -> None:
        """Close all other shards, until they are read again."""
        self.shards.keep(set(shards))

    def close(self) -> None:
        """Let go of the mapped files, and end what fetches them."""
        self.shards.close()
        if isinstance(self.shelf, StagedShards):
            self.shelf.close()

    def _stack(self, samples: list[CachedSample], level: int, size: tuple[int, int], pin: bool) -> StoredTap:
        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=pin)

        shape, name = (self.layout.channels[level], *size), self.layout.names[level]
        taps = [sample.taps[level] for sample in samples]
        return stack(self.key.coding[level], taps, shape, level=name, allocate=allocate)

    def _sample(self, position: int, view: int) -> CachedSample:
        """One sample. A damaged copy of a file that lies elsewhere is fetched again, once."""
        line = self._line_of(position, view)
        try:
            return self._read(line)
        except ShardCorrupt:
            with self._healing:
                try:
                    return self._read(line)  # another thread may have fetched it meanwhile
                except ShardCorrupt:
                    if not self.shards.renew(int(self._index["shard"][line])):
                        raise
                    return self._read(line)

    def _line_of(self, position: int, view: int) -> int:
        known = 0 <= view < self._line.shape[0] and 0 <= position < self._line.shape[1]
        if not known or self._line[view, position] < 0:
            raise IndexError(
                f"{self.folder} has no image {position} in view {view}; it holds {self._line.shape[1]} images "
                f"in {self._line.shape[0]} view(s)"
            )
        return int(self._line[view, position])

    def _read(self, line: int) -> CachedSample:
        shard, row = int(self._index["shard"][line]), int(self._index["row"][line])
        key = (int(self._index["image_id"][line]), int(self._index["view"][line]))
        file = self.files[shard]
        try:
            sample, stored = read_row(self.shards.row(shard, row), self.key)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ShardCorrupt(file.path, file.id, row, key, "a readable row", error) from error
        if (sample.image_id, sample.view) != key:
            raise ShardCorrupt(file.path, file.id, row, key, f"the sample {key}", (sample.image_id, sample.view))
        if self.verify == "always" or (self.verify == "first" and not self._verified[line]):
            expected, found = int(self._index["checksum"][line]), sample.checksum
            if not expected == stored == found:
                got = f"{found:016x} (the row says {stored:016x})"
                raise ShardCorrupt(file.path, file.id, row, key, f"xxh3_64 {expected:016x}", got)
            self._verified[line] = True
        return sample


def _reopen(
    folder: Path | str, key: CacheKey, verify: Verify, open_shards: int, staging: Staging | None
) -> TeacherCache:
    return TeacherCache.open(folder, key, verify=verify, open_shards=open_shards, staging=staging)
