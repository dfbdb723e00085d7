"""Working sets for `cache_read`: finished teacher caches of made-up taps, and what must be read from them."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from data_sharding.batch import Taps
from data_sharding.cache.key import CacheKey
from data_sharding.cache.writer import CacheWriter, TapsOf
from data_sharding.codecs.catalogue import CODECS
from data_sharding.codecs.foreground import ENLARGED, foreground_cells
from data_sharding.datasets.base import Source
from data_sharding.keyed import uniforms
from data_sharding.pack import pack
from data_sharding.record import Category, Record
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewConfig, ViewTable

LEVELS, STRIDES, CHANNELS = ("p3", "p4", "p5", "p6", "p7"), (8, 16, 32, 64, 128), 256
BOX_SIDES = (16, 64)
"""Pixels between which the sides of the made-up objects lie."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one cache stores."""

    codec: str
    foreground: int
    """Percent of P3's positions that lie inside enlarged boxes; 0 where the codec is dense."""

    @property
    def name(self) -> str:
        """As the rows of the table call it."""
        return self.codec + (f", {self.foreground} %" if self.foreground else "")


def cases() -> list[Case]:
    """Every codec of the project that is not wider than fp16; sparse ones at 10 % foreground, one at 3 and 30 too."""
    found = [Case(codec=name, foreground=10 * c.sparse) for name, c in CODECS.items() if c.dtype.itemsize <= 2]
    sparse = next((case.codec for case in found if case.foreground), None)
    return found + [Case(codec=sparse, foreground=percent) for percent in (3, 30) if sparse is not None]


def dense_bytes(canvas: tuple[int, int]) -> int:
    """Bytes of all levels of one sample as dense fp16."""
    return 2 * CHANNELS * sum(h * w for h, w in _sizes(canvas))


@dataclass(frozen=True)
class Stored:
    """A finished cache of `count` samples on one canvas, and its bytes as plain pyarrow finds them."""

    case: Case
    folder: Path
    key: CacheKey
    image_ids: tuple[int, ...]
    """By position."""

    @property
    def files(self) -> list[Path]:
        """The shards."""
        return sorted(self.folder.glob("v*/*.arrow"))

    @cached_property
    def bytes(self) -> float:
        """Of one sample on average, with everything that Arrow adds."""
        return sum(path.stat().st_size for path in self.files) / len(self.image_ids)

    def payloads(self) -> Iterator[tuple[int, np.ndarray, list[np.ndarray], list[int]]]:
        """Per sample: position, its rows (n,) uint8, its scales per level (float16) and its rows per level."""
        position = {image_id: i for i, image_id in enumerate(self.image_ids)}
        for path in self.files:
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                for i in range(reader.num_record_batches):
                    row = {name: column[0] for name, column in reader.get_batch(i).to_pydict().items()}
                    scales = [np.frombuffer(scale, np.float16) for scale in row["scale"]]
                    yield position[row["image_id"]], np.frombuffer(row["feat"], np.uint8), scales, row["npos"]

    def words(self, *, decoded: bool) -> np.ndarray:
        """(n,) uint64: the sum of each sample's bytes in words of eight, as stored or multiplied out to fp16."""
        found = np.zeros(len(self.image_ids), np.uint64)
        for position, rows, scales, counts in self.payloads():
            if decoded and CODECS[self.case.codec].per is not None:
                rows = _multiplied(rows, scales, counts, per_row=CODECS[self.case.codec].per == "position")
            found[position] = word_sum(rows)
        return found


def word_sum(x: np.ndarray) -> np.uint64:
    """The sum of a contiguous array's bytes, eight at a time, modulo 2 ** 64."""
    return x.reshape(-1).view(np.uint64).sum(dtype=np.uint64)


def make(case: Case, folder: Path, canvas: tuple[int, int], count: int) -> Stored:
    """Write the cache where it is not finished yet."""
    dataset = _images(folder / f"images-{canvas[0]}-{case.foreground}-{count}", canvas, count, case.foreground)
    views = ViewTable.open_or_draw(dataset, ViewConfig(count=1, flip=0.0, short_side=None, buckets=(canvas,)))
    key = CacheKey(
        dataset_uid=dataset.uid,
        views_uid=views.uid,
        teacher="noise",
        weights_sha256="0" * 64,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        taps=LEVELS,
        channels=(CHANNELS,) * len(LEVELS),
        strides=STRIDES,
        canvases=views.buckets,
        codecs=(case.codec,) * len(LEVELS),
        enlarged=ENLARGED if case.foreground else None,
        batch=1,
    )
    into = folder / f"{case.codec}-{case.foreground}-{count}-{key.uid[:8]}"
    writer = CacheWriter(into, key, dataset, views)
    pending = list(writer.pending())
    for shard in pending:
        writer.fill(shard, _teacher(canvas))
    if pending or not (into / "manifest.json").exists():
        writer.finish()
    return Stored(case, into, key, tuple(dataset.image_ids.tolist()))


def _sizes(canvas: tuple[int, int]) -> list[tuple[int, int]]:
    return [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in STRIDES]


def _teacher(canvas: tuple[int, int]) -> TapsOf:
    """Taps of an image alone: stretches of one long noise, where the image's position says."""
    sizes = _sizes(canvas)
    total = CHANNELS * sum(h * w for h, w in sizes)
    noise = torch.randn(total + 2**20, generator=torch.Generator().manual_seed(0))

    def taps_of(positions: np.ndarray, view: int) -> Taps:
        (position,) = positions.tolist()
        start, levels = position * 4099 % 2**20, []
        for height, width in sizes:
            stretch = noise[start : start + height * width * CHANNELS]
            levels.append(stretch.view(1, height, width, CHANNELS).permute(0, 3, 1, 2))
            start += stretch.numel()
        return Taps(None, tuple(levels))

    return taps_of


def _images(folder: Path, canvas: tuple[int, int], count: int, percent: int) -> PackedDataset:
    """Black images with boxes that cover `percent` of P3."""
    file = io.BytesIO()
    Image.new("RGB", (canvas[1], canvas[0])).save(file, "PNG")

    def read(number: int) -> Record:
        boxes = _boxes(canvas, percent, number) if percent else np.zeros((0, 4), np.float32)
        return Record(
            image_id=number + 1,
            file_name=f"{number}.png",
            width=canvas[1],
            height=canvas[0],
            image=file.getvalue(),
            boxes=boxes,
            labels=np.zeros(len(boxes), np.int64),
            annotation_ids=np.arange(len(boxes), dtype=np.int64),
            areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
            crowd=np.zeros(len(boxes), np.bool_),
            difficult=np.zeros(len(boxes), np.bool_),
        )

    fingerprint = hashlib.sha256(repr((canvas, count, percent, BOX_SIDES)).encode()).hexdigest()
    module = SimpleNamespace(
        source=lambda config, split: Source(count=count, fingerprint=fingerprint, read=read),
        categories=lambda config: (Category(1, "thing"),),
    )
    return pack(None, cast("Any", module), "train", folder)


def _boxes(canvas: tuple[int, int], percent: int, number: int) -> np.ndarray:
    """(N, 4) float32: as many of a line of random boxes as it takes."""
    drawn = uniforms("boxes", canvas, number, count=4 * 2000).reshape(-1, 4)
    sides = BOX_SIDES[0] * (BOX_SIDES[1] / BOX_SIDES[0]) ** drawn[:, 2:]
    corners = drawn[:, :2] * (np.array([canvas[1], canvas[0]]) - sides)
    boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
    low, high = 0, len(boxes)
    while high - low > 1:
        middle = (low + high) // 2
        (mask,) = foreground_cells([torch.from_numpy(boxes[:middle])], canvas, STRIDES[:1], ENLARGED)
        low, high = (middle, high) if 100 * float(mask.float().mean()) < percent else (low, middle)
    return boxes[:high]


def _multiplied(rows: np.ndarray, scales: list[np.ndarray], counts: list[int], *, per_row: bool) -> np.ndarray:
    """A sample's stored int8 rows as fp16, with a scale per row or per channel."""
    parts, start = [], 0
    for scale, count in zip(scales, counts, strict=True):
        values = rows[start : start + count * CHANNELS].view(np.int8).reshape(count, CHANNELS).astype(np.float32)
        factor = scale.astype(np.float32)
        parts.append((values * (factor[:, None] if per_row else factor)).astype(np.float16))
        start += count * CHANNELS
    return np.concatenate(parts)
