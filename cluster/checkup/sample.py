"""A few images of each split, packed into a folder of the doctor's own, so that all else runs as in a real run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from cluster import build
from cluster.build import Split
from cluster.checkup.data import Labels, spread
from cluster.config import RunConfig
from cluster.packing import SPLITS
from data_sharding.datasets.base import Source
from data_sharding.pack import pack
from data_sharding.record import Record


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some images of both splits."""

    train: Split
    val: Split
    row_bytes: float
    """What an image takes in a packed shard, on average."""


def pack_sample(config: RunConfig, labels: Labels, folder: Path, images: int) -> Sample:
    """Pack at most `images` of each split, evenly spread, below `folder`."""
    there = replace(config, storage=str(folder))
    for split in SPLITS:
        source = labels.sources[split]
        chosen = spread(source.count, images)
        part = Source(count=len(chosen), fingerprint=source.fingerprint, read=_nth(source, chosen))
        module: Any = SimpleNamespace(
            source=lambda settings, name, part=part: part, categories=lambda settings: labels.categories
        )
        pack(config.data, cast("Any", module), split, build.split_folder(there, split))
    train, val = build.open_train(there), build.open_val(there)
    packed = sum(shard.bytes for split in (train, val) for shard in split.dataset.shards)
    return Sample(train=train, val=val, row_bytes=packed / (len(train.dataset) + len(val.dataset)))


def _nth(source: Source, chosen: list[int]) -> Callable[[int], Record]:
    return lambda position: source.read(chosen[position])
