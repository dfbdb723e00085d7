"""Reads what a teacher saw, stored by `cache_writer`, and never returns anything else.

Taps come back as they are stored (`StoredTaps`), all rows of a batch side by side, so that few bytes travel to the
training device; `StoredTaps.decode` makes maps of them there.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from torch import Tensor

from data_sharding.batch import StoredTaps
from data_sharding.cache_batch import BatchCopy
from data_sharding.cache_buffers import BatchBuffers
from data_sharding.cache_key import COMMAND, CacheKey, canonical_json, library_versions
from data_sharding.cache_mapping import MappedShard, MappedShards, ShardFile
from data_sharding.cache_pages import Pages
from data_sharding.cache_rows import ShardCorrupt, StoredRow
from data_sharding.cache_writer import CacheIncomplete
from data_sharding.replay import TOLERANCE, ReplayDiffers, difference, sampled

Verify = Literal["first", "always", "never"]
BRINGING = 2
"""Threads that bring in pages ahead of the copy."""


class TeacherCache:
    """A finished cache. Safe to read from several threads; each process opens its own."""

    def __init__(self, folder: Path, key: CacheKey, manifest: dict[str, Any], verify: Verify, open_shards: int) -> None:
        """Use `open`."""
        self.folder, self.key, self.layout, self.verify = folder, key, key.layout, verify
        self._coding = key.coding
        files = [
            ShardFile(folder / s["name"], s["id"], s["rows"], s["bytes"], s["xxh3_128"]) for s in manifest["shards"]
        ]
        for file in files:
            file.require_size()
        self.shards = MappedShards(files, key, limit=open_shards)
        self._index = _read_index(folder / "index.arrow", manifest["index"])
        self._line = np.full((manifest["views"], manifest["images"]), -1, np.int64)
        self._line[self._index["view"], self._index["position"]] = np.arange(len(self._index["row"]))
        self._verified, self._replayed = np.zeros((2, len(self._index["row"])), np.bool_)
        columns = (self._index[name].tolist() for name in ("shard", "row", "image_id", "view"))
        self._places = list(zip(*columns, strict=True))
        self._buffers = {pin: BatchBuffers(pin=pin) for pin in (False, True)}
        self._pages = Pages()
        self._bringing = ThreadPoolExecutor(BRINGING, thread_name_prefix="pages")

    @classmethod
    def open(cls, folder: Path, key: CacheKey, *, verify: Verify = "first", open_shards: int = 1024) -> "TeacherCache":
        """Open a finished cache that was made with exactly `key`.

        `verify`: check a sample's bytes on its first read in this process, on every read, or never. `open_shards`
        files stay mapped.

        Raises CacheIncomplete without a manifest, ForeignCache naming each differing setting, and ShardCorrupt for
        files that are missing, cut or longer than they were.
        """
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be first, always or never, got {verify!r}")
        return cls(folder, key, _read_manifest(folder, key), verify, open_shards)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Another process opens the same folder by itself: mappings do not travel."""
        return _reopen, (self.folder, self.key, self.verify, self.shards.limit)

    def __len__(self) -> int:
        """The number of samples: images times views."""
        return len(self._verified)

    def read(
        self, positions: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray, *, pin: bool = False
    ) -> StoredTaps:
        """The taps of image positions[i] in view views[i], encoded, on the CPU (`pin`: in page-locked memory).

        All samples must share a canvas. Raises ShardCorrupt for a sample that is not what was written.
        """
        lines = self._lines(positions, views)
        rows = self._rows(lines)
        canvas, *others = {row.canvas[:2] for row in rows}
        if others:
            found = sorted([canvas, *others])
            raise ValueError(f"a batch must have one canvas, these {len(rows)} samples have {found}")
        sizes = self.layout.sizes(canvas)
        batch = BatchCopy(rows, self._coding, self.layout.channels, sizes, self._buffers[pin])
        for number, line in enumerate(lines):
            check = self.verify == "always" or (self.verify == "first" and not self._verified[line])
            found = batch.copy(number, check=check)
            if found is not None:
                self._require_checksum(line, rows[number].checksum, found)
                self._verified[line] = True
        return self.layout.stored(batch.taps())

    def expect(self, positions: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray) -> None:
        """Have threads bring in the pages of samples that will be read soon, where that was not asked for before."""
        if len(positions):
            self._bringing.submit(self._bring, self._lines(positions, views))

    def require_same_pixels(self, positions: Sequence[int], views: Sequence[int], images: Tensor) -> None:
        """Compare (B, 3, H, W) uint8 renderings at the student's resolution with what was kept of them beside the
        teacher's taps: each sample once in this process, none with `verify` never. Raises ReplayDiffers."""
        for position, view, image in zip(positions, views, images, strict=True):
            line = int(self._line[view, position])
            if self.verify == "never" or self._replayed[line]:
                continue
            (sample,) = self._rows([line])
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
        for file in self.shards.files:
            file.require_content()

    def close(self) -> None:
        """Let go of the mapped files, and end the threads."""
        self._bringing.shutdown(wait=True, cancel_futures=True)
        self.shards.close()

    def _lines(self, positions: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray) -> list[int]:
        """The index's line of each sample."""
        images, count = self._line.shape[1], self._line.shape[0]
        lines = []
        for position, view in zip(positions, views, strict=True):
            line = int(self._line[view, position]) if 0 <= view < count and 0 <= position < images else -1
            if line < 0:
                raise IndexError(
                    f"{self.folder} has no image {position} in view {view}; it holds {images} images in {count} view(s)"
                )
            lines.append(line)
        return lines

    def _rows(self, lines: list[int]) -> list[StoredRow]:
        """What is short in these samples, and where the rest is mapped."""
        open_shards: dict[int, MappedShard] = {}
        rows = []
        for line in lines:
            shard, row, image_id, view = self._places[line]
            mapped = open_shards.get(shard)
            if mapped is None:
                mapped = open_shards[shard] = self.shards.shard(shard)
            rows.append(mapped.row(row, (image_id, view)))
        return rows

    def _require_checksum(self, line: int, stored: int, found: int) -> None:
        expected = int(self._index["checksum"][line])
        if not expected == stored == found:
            shard, row, image_id, view = self._places[line]
            file, got = self.shards.files[shard], f"{found:016x} (the row says {stored:016x})"
            raise ShardCorrupt(file.path, file.id, row, (image_id, view), f"xxh3_64 {expected:016x}", got)

    def _bring(self, lines: list[int]) -> None:
        for line in lines:
            shard, number, image_id, view = self._places[line]
            try:
                mapped = self.shards.shard(shard)
                if not mapped.brought[number]:
                    mapped.brought[number] = True
                    self._pages.bring(mapped.row(number, (image_id, view)).values)
            except ShardCorrupt:
                # Whoever reads this sample is told; here nobody listens.
                continue


def _reopen(folder: Path, key: CacheKey, verify: Verify, open_shards: int) -> TeacherCache:
    return TeacherCache.open(folder, key, verify=verify, open_shards=open_shards)


def _read_manifest(folder: Path, key: CacheKey) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        written = len(list((folder / "receipts").glob("*.json")))
        raise CacheIncomplete(
            f"{folder} holds no finished teacher cache ({written} shards are written); run `{COMMAND}` to fill it"
        )
    try:
        manifest = json.loads(path.read_bytes())
        stated = manifest.pop("xxh3_128")
        found = xxhash.xxh3_128(canonical_json(manifest)).hexdigest()
    except (ValueError, KeyError, AttributeError) as error:
        raise ShardCorrupt(path, "manifest", None, None, "a readable manifest", error) from error
    if stated != found:
        raise ShardCorrupt(path, "manifest", None, None, f"xxh3_128 {stated}", found)
    key.require_same(folder, manifest["key"])
    return manifest


def _read_index(path: Path, stated: dict[str, Any]) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardCorrupt(path, "index", None, None, "a readable index", error) from error
    found = xxhash.xxh3_128(content).hexdigest()
    if found != stated["xxh3_128"]:
        raise ShardCorrupt(path, "index", None, None, f"xxh3_128 {stated['xxh3_128']}", found)
    table = pa.ipc.open_file(content).read_all()
    return {name: table[name].to_numpy() for name in table.column_names}
