"""Pack the splits of a recipe's data set, unless they are packed already."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.build import split_folder
from cluster.config import RunConfig
from cluster.driver import say
from cluster.terminal import progress
from data_sharding.pack import pack
from data_sharding.problems import REPORT, read_report
from data_sharding.shards import PackedDataset
from kd.plugins import plugin

SPLITS = ("train", "val")
PATIENCE = 0.5
"""Seconds between two looks at what another process packs."""


def pack_splits(config: RunConfig) -> dict[str, PackedDataset]:
    """Pack or complete train and val, with a progress bar each; what is packed already is checked and opened.

    What was skipped is said in a line each time.
    """
    module: Any = plugin("data_sharding.datasets", config.data.name)
    packed: dict[str, PackedDataset] = {}
    for split in SPLITS:
        folder = split_folder(config, split)
        with progress(f"pack {split}") as report:
            packed[split] = _in_turn(lambda f=folder, s=split, r=report: pack(config.data, module, s, f, progress=r))
        told = read_report(folder)
        if told["images_skipped"] or told["annotations_skipped"]:
            say(
                f"pack {split}: {told['images_skipped']} image(s) and {told['annotations_skipped']} annotation(s) left "
                f"out, listed in {folder / REPORT}"
            )
    return packed


def _in_turn(act: Callable[[], PackedDataset]) -> PackedDataset:
    """Runs that begin together share their data: one packs, the others wait and find it there."""
    told = False
    while True:
        try:
            return act()
        except BlockingIOError as error:
            if not told:
                say(f"{str(error).partition(';')[0]}; waiting for it")
            told = True
            time.sleep(PATIENCE)


def size_of(dataset: PackedDataset) -> int:
    """Bytes of all files of a packed split."""
    return sum(path.stat().st_size for path in Path(dataset.folder).rglob("*") if path.is_file())


def summary(packed: dict[str, PackedDataset]) -> list[dict[str, object]]:
    """One row per split for the closing table."""
    return [_row(split, dataset) for split, dataset in packed.items()]


def irregular(packed: dict[str, PackedDataset]) -> list[dict[str, object]]:
    """One row per kind of problem, for a table of its own: what was left out, what was only noted, and where each
    one is listed."""
    rows: list[dict[str, object]] = []
    for split, dataset in packed.items():
        problems = read_report(dataset.folder)["problems"]
        kinds = Counter((p["kind"], p["costs"]) for p in problems)
        rows += [
            {
                "found": kind,
                "split": split,
                "count": count,
                "left out": "-" if costs == "nothing" else f"the {costs}",
                "listed in": str(dataset.folder / REPORT),
            }
            for (kind, costs), count in kinds.items()
        ]
    return rows


def _row(split: str, dataset: PackedDataset) -> dict[str, object]:
    told = read_report(dataset.folder)
    return {
        "split": split,
        "images": len(dataset),
        "objects": sum(len(dataset.record(i).boxes) for i in range(len(dataset))),
        "classes": len(dataset.categories),
        "images left out": told["images_skipped"],
        "labels left out": told["annotations_skipped"],
        "shards": len(dataset.shard_sizes),
        "MB": size_of(dataset) / 1e6,
        "folder": str(dataset.folder),
    }
