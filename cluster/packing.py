"""Pack the splits of a recipe's data set, unless they are packed already."""

from pathlib import Path
from typing import Any

from cluster.build import split_folder
from cluster.config import RunConfig
from cluster.terminal import progress
from data_sharding.pack import pack
from data_sharding.shards import PackedDataset
from kd.plugins import plugin

SPLITS = ("train", "val")


def pack_splits(config: RunConfig) -> dict[str, PackedDataset]:
    """Pack or complete train and val, with a progress bar each; what is packed already is checked and opened."""
    module: Any = plugin("data_sharding.datasets", config.data.name)
    packed: dict[str, PackedDataset] = {}
    for split in SPLITS:
        folder = split_folder(config, split)
        with progress(f"pack {split}") as report:
            packed[split] = pack(config.data, module, split, folder, progress=report)
    return packed


def size_of(dataset: PackedDataset) -> int:
    """Bytes of all files of a packed split."""
    return sum(path.stat().st_size for path in Path(dataset.folder).rglob("*") if path.is_file())


def summary(packed: dict[str, PackedDataset]) -> list[dict[str, object]]:
    """One row per split for the closing table."""
    return [
        {
            "split": split,
            "images": len(dataset),
            "objects": sum(len(dataset.record(i).boxes) for i in range(len(dataset))),
            "classes": len(dataset.categories),
            "shards": len(dataset.shard_sizes),
            "MB": size_of(dataset) / 1e6,
            "folder": str(dataset.folder),
        }
        for split, dataset in packed.items()
    ]
