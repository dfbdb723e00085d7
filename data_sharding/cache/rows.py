"""One sample of a teacher cache as a row of an Arrow file. Shape letters: L taps."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding import shards
from data_sharding.cache.groups import pieces
from data_sharding.cache.key import CacheKey
from data_sharding.codecs.base import require_lengths
from data_sharding.codecs.catalogue import Encoded, row_bytes


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
        rows, scales, masks = zip(*((t.rows, len(t.scale), len(t.mask)) for t in self.taps), strict=True)
        hasher = xxhash.xxh3_64(seed=_head(self.image_id, self.view, self.canvas, rows, scales, masks, self.pixels))
        for parts in ((t.scale for t in self.taps), (t.mask for t in self.taps), (t.payload for t in self.taps)):
            for part in parts:
                hasher.update(part)
        return hasher.intdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRow:
    """One sample as it lies in a mapped file: what is short was read, what is long is read when it is copied."""

    image_id: int
    view: int
    canvas: tuple[int, int, int, int]
    rows: tuple[int, ...]
    """Stored positions of each tap."""
    checksum: int
    """As the row itself states it; the index states it again."""
    pixels: bytes
    head: int
    """The hash of all that is above; `hasher` goes on from it."""
    scales: np.ndarray
    """(bytes,) uint8: of all taps, one after the other; as `masks` and `values`."""
    masks: np.ndarray
    values: np.ndarray
    parts: tuple[np.ndarray, ...]
    """`scales`, then `masks`, then `values`, each cut where the key's groups of taps end."""

    def hasher(self) -> "xxhash.xxh3_64":
        """The row's checksum once `scales`, `masks` and `values` have gone through it, in this order."""
        return xxhash.xxh3_64(seed=self.head)

    def digest(self) -> int:
        """The checksum of what lies there now."""
        hasher = self.hasher()
        for part in (self.scales, self.masks, self.values):
            hasher.update(part.data)
        return hasher.intdigest()


def _head(
    image_id: int,
    view: int,
    canvas: Sequence[int],
    rows: Sequence[int],
    scales: Sequence[int],
    masks: Sequence[int],
    pixels: bytes,
) -> int:
    """A hash of what is short in a row, and of where its long parts begin and end."""
    taps = len(rows)
    numbers = (image_id, view, *canvas, *rows, *scales, *masks, len(pixels))
    return xxhash.xxh3_64_intdigest(struct.pack(f"<qi4i{taps}i{taps}q{taps}qq", *numbers) + pixels)


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


def read_row(batch: pa.RecordBatch, key: CacheKey) -> StoredRow:
    """The sample of a row; nothing long is copied or touched.

    Raises ValueError when the row's lengths contradict each other or what the key's codecs need.
    """
    image_id, view, canvas, rows, checksum = (batch.column(i)[0].as_py() for i in range(5))
    scales, masks = _lists(batch.column(5)), _lists(batch.column(6))
    values, pixels = _binary(batch.column(7)), batch.column(8)[0].as_py()
    if (canvas[0], canvas[1]) not in key.canvases:
        raise ValueError(f"canvas {canvas} is none of {key.canvases}")
    sizes = key.layout.sizes((canvas[0], canvas[1]))
    bits = np.split(masks.content, np.cumsum(masks.sizes)[:-1])
    for name, codec, channels, (height, width), n, scale, mask in zip(
        key.taps, key.coding, key.channels, sizes, rows, scales.sizes, bits, strict=True
    ):
        require_lengths(codec, channels, height * width, n, scale, mask, level=name)
    lengths = [n * row_bytes(c, channels) for n, c, channels in zip(rows, key.coding, key.channels, strict=True)]
    if len(values) != sum(lengths):
        raise ValueError(f"{rows} positions need {sum(lengths)} bytes, the payload has {len(values)}")
    return StoredRow(
        image_id=image_id,
        view=view,
        canvas=tuple(canvas),
        rows=tuple(rows),
        checksum=checksum,
        pixels=pixels,
        head=_head(image_id, view, canvas, rows, scales.sizes, masks.sizes, pixels),
        scales=scales.content,
        masks=masks.content,
        values=values,
        parts=(
            *pieces(scales.content, scales.sizes, key.groups),
            *pieces(masks.content, masks.sizes, key.groups),
            *pieces(values, lengths, key.groups),
        ),
    )


@dataclass(frozen=True)
class _List:
    content: np.ndarray
    sizes: list[int]


def _lists(column: pa.Array) -> _List:
    """The byte strings of a one-row list column as one stretch of memory, not copied, and the length of each."""
    values: pa.Array = column.flatten()
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    content = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    return _List(content, np.diff(ends).tolist())


def _binary(column: pa.Array) -> np.ndarray:
    """The bytes of a one-row large_binary column, not copied, which taking pyarrow's scalar would do."""
    _, offsets, data = column.buffers()
    start, end = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2]
    return np.frombuffer(data, np.uint8)[start:end]
