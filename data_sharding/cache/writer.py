"""Fills a teacher cache: any number of writers, killed anywhere, give the same bytes.

A shard is written under a temporary name, synced, renamed to a name that holds the hash of its content, and only then
gets a receipt. To resume is to skip the shards that have one. The manifest comes last and makes the cache readable.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from torch import Tensor

from data_sharding.batch import Taps
from data_sharding.cache.foreground import foreground_masks
from data_sharding.cache.key import COMMAND, CacheKey, canonical_json
from data_sharding.cache.plan import CacheShard, plan
from data_sharding.cache.replay import sampled
from data_sharding.cache.rows import CachedSample, schema, write_row
from data_sharding.files import stamped, sync_folder, unstamped, write_atomically

if TYPE_CHECKING:
    from data_sharding.shards import PackedDataset
    from data_sharding.views import ViewTable


@dataclass(frozen=True)
class Seen:
    """A teacher's taps, and the images that it was asked about."""

    taps: Taps
    images: Tensor
    """(B, 3, H, W) uint8: the student's rendering, whatever the teacher's resolution."""


TapsOf = Callable[[np.ndarray, int], Taps | Seen]
"""(image positions, view index) -> the teacher's taps of these images, on the student's grid. With the images, whoever
reads the cache checks that it replays the same pixels."""

INDEX_COLUMNS = pa.schema(
    [
        ("view", pa.int32()),
        ("position", pa.int64()),
        ("image_id", pa.int64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("bytes", pa.int64()),
        ("checksum", pa.uint64()),
    ]
)


class CacheIncomplete(ValueError):
    """Some shards of a cache are not written yet."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What is known of a finished shard."""

    id: str
    name: str
    """Path below the cache's folder."""
    uid: str
    bytes: int
    xxh3_128: str
    samples: tuple[tuple[int, int, int], ...]
    """Per row: image id, payload bytes, checksum."""


class CacheWriter:
    """Writes the shards of one cache below `folder`."""

    def __init__(self, folder: Path, key: CacheKey, dataset: "PackedDataset", views: "ViewTable") -> None:
        """Raises ForeignCache when `folder` holds a cache of another key, finished or not."""
        self.folder, self.key, self.dataset, self.views = folder, key, dataset, views
        self.shards = plan(key, dataset, views)
        (folder / "receipts").mkdir(parents=True, exist_ok=True)
        stored = folder / "key.json"
        if stored.exists():
            key.require_same(folder, json.loads(stored.read_bytes()))
        else:
            write_atomically(stored, canonical_json(asdict(key)))

    def pending(self, writer: int = 0, writers: int = 1) -> Iterator[CacheShard]:
        """The shards that have no receipt yet; of several writers, each gets its own."""
        return (s for s in self.shards[writer::writers] if self.receipt(s) is None)

    def receipt(self, shard: CacheShard) -> Receipt | None:
        """The receipt of a finished shard; None when the shard has to be written: also where a byte of it changed."""
        try:
            found = unstamped(self._receipt_path(shard).read_bytes())
            receipt = Receipt(**{**found, "samples": tuple(tuple(s) for s in found["samples"])})
            whole = (self.folder / receipt.name).stat().st_size == receipt.bytes
        except (OSError, ValueError, TypeError, KeyError):
            return None
        planned = (shard.id, self.key.uid, len(shard.positions))
        return receipt if whole and (receipt.id, receipt.uid, len(receipt.samples)) == planned else None

    def fill(self, shard: CacheShard, taps_of: TapsOf) -> Receipt:
        """Run the teacher over a shard, in the batches of the plan, and write it."""
        return self.write(shard, self._samples(shard, taps_of))

    def write(self, shard: CacheShard, samples: Iterable[CachedSample]) -> Receipt:
        """Write the samples of a shard, one per position of the plan and in its order."""
        expected = [(int(self.dataset.image_ids[i]), shard.view) for i in shard.positions]
        temporary = self.folder / f"{shard.id}.tmp.{uuid.uuid4().hex}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                hashing = _HashingFile(file)
                rows = _write_rows(hashing, schema(self.key), expected, samples, shard.id)
                file.flush()
                os.fsync(file.fileno())
            digest = hashing.hasher.hexdigest()
            name = f"{shard.id}-{digest}.arrow"
            temporary.replace(self.folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(temporary.parent)
        size = hashing.written
        receipt = Receipt(id=shard.id, name=name, uid=self.key.uid, bytes=size, xxh3_128=digest, samples=tuple(rows))
        write_atomically(self._receipt_path(shard), stamped(asdict(receipt)))
        return receipt

    def finish(self) -> None:
        """Write the index and the manifest once all shards are there, and clear away what killed writers left.

        Raises CacheIncomplete while shards are missing. Call it from one process, when no writer is at work.
        """
        receipts = [r for r in map(self.receipt, self.shards) if r is not None]
        if len(receipts) < len(self.shards):
            missing = next(s.id for s in self.shards if self.receipt(s) is None)
            raise CacheIncomplete(
                f"{self.folder}: {len(receipts)} of {len(self.shards)} shards are written, the first missing one is "
                f"{missing}; run `{COMMAND}` again to write the rest"
            )
        index = _index(self.shards, receipts)
        write_atomically(self.folder / "index.arrow", index)
        manifest: dict[str, Any] = {
            "uid": self.key.uid,
            "key": asdict(self.key),
            "views": self.views.count,
            "images": len(self.dataset),
            "index": {"bytes": len(index), "xxh3_128": xxhash.xxh3_128(index).hexdigest()},
            "shards": [
                {"id": r.id, "name": r.name, "rows": len(r.samples), "bytes": r.bytes, "xxh3_128": r.xxh3_128}
                for r in receipts
            ],
            "complete": True,
        }
        manifest["xxh3_128"] = xxhash.xxh3_128(canonical_json(manifest)).hexdigest()
        self._clear({r.name for r in receipts})
        write_atomically(self.folder / "manifest.json", canonical_json(manifest))

    def _samples(self, shard: CacheShard, taps_of: TapsOf) -> Iterator[CachedSample]:
        layout, coding = self.key.layout, self.key.coding
        for batch in shard.batches:
            views = [self.views.view(i, shard.view) for i in batch]
            canvas = views[0].canvas
            found = taps_of(np.array(batch, np.int64), shard.view)
            taps, images = (found.taps, found.images) if isinstance(found, Seen) else (found, None)
            tensors = layout.split(taps, len(batch), canvas)
            masks = foreground_masks(self.key, self.dataset, self.views, batch, shard.view)
            for row, (position, view) in enumerate(zip(batch, views, strict=True)):
                yield CachedSample(
                    image_id=int(self.dataset.image_ids[position]),
                    view=shard.view,
                    canvas=(*canvas, *view.size),
                    taps=tuple(
                        c.encode(t[row], None if m is None else m[row], level=n)
                        for n, c, t, m in zip(layout.names, coding, tensors, masks, strict=True)
                    ),
                    pixels=b"" if images is None else sampled(images[row], view.size),
                )

    def _receipt_path(self, shard: CacheShard) -> Path:
        return self.folder / "receipts" / f"{shard.id.replace('/', '-')}.json"

    def _clear(self, wanted: set[str]) -> None:
        for path in sorted(p for p in self.folder.glob("**/*") if p.is_file()):
            leftover = path.suffix == ".arrow" and path.parent != self.folder and path.parent.name.startswith("v")
            if ".tmp." in path.name or (leftover and path.relative_to(self.folder).as_posix() not in wanted):
                path.unlink()


class _HashingFile:
    """What pyarrow writes to: passes bytes on and hashes them on the way, so that nothing is read back."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hasher, self.written = file, xxhash.xxh3_128(), 0

    def write(self, content: bytes) -> int:
        self.hasher.update(content)
        self.written += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.written

    def flush(self) -> None:
        self.file.flush()


def _write_rows(
    sink: _HashingFile, columns: pa.Schema, expected: list[tuple[int, int]], samples: Iterable[CachedSample], shard: str
) -> list[tuple[int, int, int]]:
    rows: list[tuple[int, int, int]] = []
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), columns) as writer:
        for sample in samples:
            planned = expected[len(rows)] if len(rows) < len(expected) else "no further sample"
            if (sample.image_id, sample.view) != planned:
                raise ValueError(
                    f"shard {shard}, row {len(rows)}: planned is {planned}, got {sample.image_id, sample.view}"
                )
            checksum = sample.checksum
            writer.write_batch(write_row(sample, checksum, columns))
            rows.append((sample.image_id, sum(len(tap.payload) for tap in sample.taps), checksum))
    if len(rows) != len(expected):
        raise ValueError(f"shard {shard}: the plan has {len(expected)} samples, got {len(rows)}")
    return rows


def _index(shards: Iterable[CacheShard], receipts: Iterable[Receipt]) -> bytes:
    """One line per sample, in the order of the plan, as an Arrow file."""
    lines = [
        (shard.view, position, image_id, number, row, size, checksum)
        for number, (shard, receipt) in enumerate(zip(shards, receipts, strict=True))
        for row, (position, (image_id, size, checksum)) in enumerate(zip(shard.positions, receipt.samples, strict=True))
    ]
    columns = [pa.array([line[i] for line in lines], field.type) for i, field in enumerate(INDEX_COLUMNS)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_COLUMNS) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=INDEX_COLUMNS))
    return sink.getvalue().to_pybytes()
