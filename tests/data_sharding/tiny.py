"""A packed split of generated images, its views and a teacher made of arithmetic, for tests of what comes after."""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from data_sharding.batch import Taps
from data_sharding.cache.key import CacheKey
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheWriter
from data_sharding.datasets.base import Source
from data_sharding.pack import pack
from data_sharding.record import Category, Record
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewConfig, ViewTable

CANVASES = ((128, 128), (128, 256), (256, 128))
KEYS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "int8 and sparse": {
        "codecs": ("sparse_channel", "sparse_position", "int8_channel"), "enlarged": 1.2, "shard_bytes": 5_000,
    },
}  # fmt: skip
"""What is stored in the caches that every promise about files is tried on."""


def tiny_record(number: int) -> Record:
    """Image `number`: id 100 + number, three shapes in turn, every fourth without objects."""
    random = np.random.Generator(np.random.Philox(key=number))
    width, height = ((120, 110), (250, 100), (90, 200))[number % 3]
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG", compress_level=0)
    objects = number % 4
    corners = random.uniform(0, 60, (objects, 2))
    return Record(
        image_id=100 + number,
        file_name=f"images/{number:03d}.png",
        width=width,
        height=height,
        image=file.getvalue(),
        boxes=np.concatenate([corners, corners + 20], 1).astype(np.float32),
        labels=np.arange(objects, dtype=np.int64) % 2,
        annotation_ids=np.arange(objects, dtype=np.int64),
        areas=np.full(objects, 400, np.float32),
        crowd=np.arange(objects) == 2,
        difficult=np.zeros(objects, np.bool_),
    )


def tiny_dataset(folder: Path, count: int = 13, shard_bytes: int = 300_000) -> PackedDataset:
    def source(config: object, split: str) -> Source:
        return Source(count=count, fingerprint=hashlib.sha256(f"tiny {count}".encode()).hexdigest(), read=tiny_record)

    module = SimpleNamespace(source=source, categories=lambda config: (Category(1, "left"), Category(2, "right")))
    return pack(None, cast("Any", module), "train", folder, shard_bytes)


def tiny_views(dataset: PackedDataset, count: int = 2, **settings: Any) -> ViewTable:
    """`count` views at native size, in three canvases."""
    chosen = {"flip": 0.5 if count > 1 else 0.0, "short_side": None, "buckets": CANVASES} | settings
    return ViewTable.open_or_draw(dataset, ViewConfig(count=count, **chosen))


def tiny_key(dataset: PackedDataset, views: ViewTable, **settings: Any) -> CacheKey:
    chosen: dict[str, Any] = {
        "dataset_uid": dataset.uid,
        "views_uid": views.uid,
        "teacher": "arithmetic",
        "weights_sha256": "0" * 64,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "taps": ("c5", "p3", "p4"),
        "channels": (5, 3, 3),
        "strides": (32, 8, 16),
        "canvases": views.buckets,
        "codecs": ("fp16", "fp16", "fp16"),
        "batch": 2,
        "shard_bytes": 12_000,
    }
    return CacheKey(**(chosen | settings))


def tiny_taps(key: CacheKey, views: ViewTable) -> Callable[[np.ndarray, int], Taps]:
    """A teacher whose taps are a function of (image, view, tap) alone."""

    def taps_of(positions: np.ndarray, view: int) -> Taps:
        sizes = key.layout.sizes(views.view(int(positions[0]), view).canvas)
        tensors = []
        for level, (channels, (h, w)) in enumerate(zip(key.channels, sizes, strict=True)):
            grid = torch.arange(channels * h * w, dtype=torch.float32).view(1, channels, h, w)
            shift = torch.as_tensor(positions, dtype=torch.float32).view(-1, 1, 1, 1)
            tensors.append(torch.sin(grid * 0.37 + shift * 1.7 + view * 11.0 + level * 5.0))
        return key.layout.join(tuple(tensors))

    return taps_of


def write(folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable, writers: int = 1) -> CacheWriter:
    taps_of = tiny_taps(key, views)
    made = [CacheWriter(folder, key, dataset, views) for _ in range(writers)]
    for number, writer in enumerate(made):
        for shard in writer.pending(number, writers):
            writer.fill(shard, taps_of)
    made[0].finish()
    return made[0]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob("**/*")) if p.is_file()}


def one_canvas(views: ViewTable, view: int) -> np.ndarray:
    ids = views.canvas_ids(np.full(len(views), view))
    return np.flatnonzero(ids == np.bincount(ids).argmax())


def tensors(taps: Taps) -> list[torch.Tensor]:
    return ([] if taps.c5 is None else [taps.c5]) + list(taps.pyramid)


def read(cache: TeacherCache, positions: Sequence[int] | np.ndarray, views: Sequence[int]) -> list[torch.Tensor]:
    """The maps of a cache in float32, as a training step sees them."""
    return tensors(cache.read(positions, views).decode())
