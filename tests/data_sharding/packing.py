"""A data set in memory for the tests of shards and packing; it loads neither torch nor an image library."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data_sharding.datasets.base import Source
from data_sharding.pack import pack
from data_sharding.record import Category, Record
from data_sharding.shards import PackedDataset

CATEGORIES = (Category(3, "cat"), Category(8, "dog"))


def record(i: int) -> Record:
    """The record at position i: of any number of objects, none included, with every optional field."""
    rng = np.random.default_rng(i)
    n = i % 4
    return Record(
        image_id=1000 + i,
        file_name=f"folder/ä{i}.jpg",
        width=40 + i,
        height=30,
        image=rng.bytes(int(rng.integers(1, 4000))),
        boxes=rng.random((n, 4), np.float32),
        labels=rng.integers(0, 2, n),
        annotation_ids=rng.integers(0, 1 << 40, n),
        areas=rng.random(n, np.float32),
        crowd=rng.random(n) < 0.5,
        difficult=rng.random(n) < 0.5,
        ignore_regions=rng.random((i % 3, 4), np.float32),
        segmentations=tuple(f"[[{j}]]" for j in range(n)) if i % 2 else (),
        keypoints=rng.random((n, 17, 3), np.float32) if i % 5 else None,
    )


def plugin(count: int, fingerprint: str = "labels", change: int | None = None, read_log: list[int] | None = None):
    """A plug-in of `count` records; the image bytes of position `change` differ though its labels do not."""

    def read(i: int) -> Record:
        if read_log is not None:
            read_log.append(i)
        found = record(i)
        if i == change:
            object.__setattr__(found, "image", b"x" * len(found.image))
        return found

    source = Source(count=count, fingerprint=fingerprint, read=read)
    return SimpleNamespace(categories=lambda _: CATEGORIES, source=lambda *_: source)


def packed(folder: Path, count: int = 40, shard_bytes: int = 30_000, **settings: object) -> PackedDataset:
    """The data set, packed into a few shards."""
    return pack(None, plugin(count, **settings), "train", folder, shard_bytes)  # pyright: ignore


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
