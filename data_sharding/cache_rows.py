"""One sample of a teacher cache as a row of an Arrow file. Shape letters: L taps."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from data_sharding import shards
from data_sharding.cache_key import CacheKey
from data_sharding.codecs import Encoded, row_bytes


class ShardCorrupt(shards.ShardCorrupt):
    """A shard does not hold what was written to it. Nothing is replaced: the run stops and says where."""

    def __init__(
        self, path: Path | str, shard: str, row: int | None, key: object, expected: object, got: object
    ) -> None:
        self.path, self.shard, self.row, self.key, self.expected, self.got = path, shard, row, key, expected, got
        where = "" if row is None else f", row {row}, (image id, view) {key}"
        super().__init__(
            f"{path}: shard {shard}{where}: expected {expected}, got {got}; "
            "delete this file and its receipt and fill the cache again: only the missing shard is written"
        )


@dataclass(frozen=True, kw_only=True)
class CachedSample:
    """The taps of one image in one view."""

    image_id: int
    view: int
    canvas: tuple[int, int, int, int]
    """(H, W, valid height, valid width) in the student's pixels."""
    taps: tuple[Encoded, ...]
    pixels: bytes = b""
    """What `replay.sampled` took of the student's rendering; empty where the writer was not given the images."""

    @property
    def checksum(self) -> int:
        """xxh3_64 of everything that the row holds, so that no part of it can change unseen."""
        hasher = xxhash.xxh3_64()
        rows = [t.rows for t in self.taps]
        hasher.update(struct.pack("<q", len(self.pixels)) + self.pixels)
        hasher.update(struct.pack(f"<qi4i{len(rows)}i", self.image_id, self.view, *self.canvas, *rows))
        for tap in self.taps:
            hasher.update(struct.pack("<qq", len(tap.scale), len(tap.mask)))
            hasher.update(tap.scale)
            hasher.update(tap.mask)
        for tap in self.taps:
            hasher.update(tap.payload)
        return hasher.intdigest()


def schema(key: CacheKey) -> pa.Schema:
    """The columns of a shard; the metadata names the cache."""
    levels = len(key.taps)
    return pa.schema(
        [
            ("image_id", pa.int64()),
            ("view", pa.int32()),
            ("canvas", pa.list_(pa.int32(), 4)),
            ("npos", pa.list_(pa.int32(), levels)),
            ("checksum", pa.uint64()),
            ("scale", pa.list_(pa.large_binary(), levels)),
            ("mask", pa.list_(pa.large_binary(), levels)),
            ("feat", pa.large_binary()),
            ("pixels", pa.binary()),
        ],
        metadata={
            "minnow.cache_format": str(key.format),
            "minnow.cache_uid": key.uid,
            "minnow.codecs": ",".join(key.codecs),
        },
    )


def write_row(sample: CachedSample, checksum: int, columns: pa.Schema) -> pa.RecordBatch:
    """A record batch of one row: a reader can take one sample without touching its neighbours."""
    feat = b"".join(t.payload for t in sample.taps)
    values: Iterable[Any] = (
        sample.image_id,
        sample.view,
        sample.canvas,
        [t.rows for t in sample.taps],
        checksum,
        [t.scale for t in sample.taps],
        [t.mask for t in sample.taps],
        feat,
        sample.pixels,
    )
    arrays = [pa.array([value], field.type) for value, field in zip(values, columns, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def read_row(batch: pa.RecordBatch, key: CacheKey) -> tuple[CachedSample, int]:
    """The sample of a row, its payload still in the mapping, and the checksum stored with it.

    Raises ValueError when the row's lengths contradict each other.
    """
    image_id, view, canvas, npos, checksum, scale, mask = (batch.column(i)[0].as_py() for i in range(7))
    feat = _only_value(batch.column(7))
    width = map(row_bytes, key.coding, key.channels)
    ends = [0, *accumulate(n * b for n, b in zip(npos, width, strict=True))]
    if min(npos) < 0 or ends[-1] != len(feat):
        raise ValueError(f"{npos} positions need {ends[-1]} bytes, the payload has {len(feat)}")
    taps = tuple(
        Encoded(rows=n, payload=feat[start:end], scale=s, mask=m)
        for n, (start, end), s, m in zip(npos, pairwise(ends), scale, mask, strict=True)
    )
    pixels = batch.column(8)[0].as_py()
    return CachedSample(image_id=image_id, view=view, canvas=tuple(canvas), taps=taps, pixels=pixels), checksum


def _only_value(column: pa.Array) -> memoryview:
    """The bytes of a one-row large_binary column, not copied, which taking pyarrow's scalar would do."""
    _, offsets, data = column.buffers()
    start, end = memoryview(offsets).cast("q")[column.offset : column.offset + 2]
    return memoryview(data)[start:end]
