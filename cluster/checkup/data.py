"""The doctor on the data: what the labels of both splits say, read as they are, before anything is packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from cluster.checkup.findings import Area, Finding, share
from cluster.config import RunConfig
from cluster.packing import SPLITS
from cluster.terminal import progress
from data_sharding.datasets.base import Source
from data_sharding.record import Category, Record
from kd.plugins import plugin

MOST_READ = 1000
"""Images per split that are read, evenly spread, where there are more."""
FEW = 10
"""Objects of a class in train below which it can hardly be learnt."""
MANY_EMPTY = 0.5
SHOWN_CLASSES = 30


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is kept of an image that was read."""

    name: str
    image_id: int
    width: int
    height: int
    boxes: np.ndarray
    """(N, 4) float32 as x1 y1 x2 y2, without crowds."""
    labels: np.ndarray
    """(N,) int64."""
    areas: np.ndarray
    """(N,) float32, px^2 of the image as it is stored."""
    digest: int
    """Of the image file's bytes."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Both splits as far as they were read."""

    module: Any
    """The data set's plug-in."""
    sources: dict[str, Source]
    categories: tuple[Category, ...]
    seen: dict[str, list[Seen]]


def read(config: RunConfig) -> Labels:
    """Read labels and image files of both splits; ValueError or OSError where the data cannot be packed."""
    module: Any = plugin("data_sharding.datasets", config.data.name)
    sources = {split: module.source(config.data, split) for split in SPLITS}
    seen = {split: _read_split(split, source) for split, source in sources.items()}
    return Labels(module=module, sources=sources, categories=module.categories(config.data), seen=seen)


def spread(count: int, most: int) -> list[int]:
    """At most `most` positions of `count`, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def _read_split(split: str, source: Source) -> list[Seen]:
    positions = spread(source.count, MOST_READ)
    with progress(f"read {split}") as report:
        seen = []
        for done, position in enumerate(positions, 1):
            seen.append(_seen(source.read(position)))
            report(done, len(positions))
    return seen


def _seen(record: Record) -> Seen:
    single = ~np.asarray(record.crowd)
    return Seen(
        name=record.file_name,
        image_id=record.image_id,
        width=record.width,
        height=record.height,
        boxes=record.boxes[single],
        labels=record.labels[single],
        areas=record.areas[single],
        digest=xxhash.xxh3_64_intdigest(record.image),
        bytes=len(record.image),
    )


def examine(config: RunConfig, labels: Labels) -> Area:
    """Counts, classes and images that both splits share."""
    findings = [_images(split, labels) for split in SPLITS]
    findings += [_classes(labels), _shared_images(labels), _epochs(config, labels)]
    return Area(title="labels", findings=findings, tables=[("objects per class", _class_rows(labels))])


def _images(split: str, labels: Labels) -> Finding:
    seen, count = labels.seen[split], labels.sources[split].count
    objects = [len(s.labels) for s in seen]
    empty = sum(n == 0 for n in objects)
    read = "all read" if len(seen) == count else f"{len(seen)} of them read"
    each = f"{sum(objects) / len(seen):.1f} objects each, {share(empty, len(seen))} without any"
    told = f"{count} images ({read}), {each}"
    check = f"images of {split}"
    if sum(objects) == 0:
        return Finding(check=check, found=told, verdict="FAIL", change=f"no object in {split}: look at its label file")
    if empty > MANY_EMPTY * len(seen):
        fix = f"{share(empty, len(seen))} of {split} hold nothing: most steps learn background alone; leave some out"
        return Finding(check=check, found=told, verdict="warn", change=fix)
    return Finding(check=check, found=told)


def _counts(labels: Labels, split: str) -> np.ndarray:
    found = np.concatenate([s.labels for s in labels.seen[split]])
    return np.bincount(found, minlength=len(labels.categories))


def _classes(labels: Labels) -> Finding:
    """Every class must be in both splits: else it is not learnt, or not measured."""
    train, val = _counts(labels, "train"), _counts(labels, "val")
    names = [c.name for c in labels.categories]
    lines = [
        f"{what}: {', '.join(n for n, m in zip(names, mask, strict=True) if m)}"
        for what, mask in (
            ("none in train", train == 0),
            ("none in val, so their AP is not measured", (val == 0) & (train > 0)),
            (f"fewer than {FEW} in train", (train > 0) & (train < FEW)),
        )
        if mask.any()
    ]
    if not lines:
        return Finding(check="classes", found=f"{len(names)}, all of them in both splits")
    whole = all(len(labels.seen[s]) == labels.sources[s].count for s in SPLITS)
    told = "; ".join(lines) + ("" if whole else " (of the images read)")
    change = f"{told}: add images of these classes, or merge or drop them"
    return Finding(check="classes", found=told, verdict="warn", change=change)


def _class_rows(labels: Labels) -> Sequence[dict[str, object]]:
    train, val = _counts(labels, "train"), _counts(labels, "val")
    rows: list[dict[str, object]] = [
        {"class": c.name, "train": int(t), "of train": share(int(t), int(train.sum())), "val": int(v)}
        for c, t, v in zip(labels.categories, train, val, strict=True)
    ]
    if len(rows) <= SHOWN_CLASSES:
        return rows
    order = np.argsort(-train, kind="stable").tolist()
    half = SHOWN_CLASSES // 2
    between: dict[str, object] = {"class": f"... {len(rows) - SHOWN_CLASSES} more ..."}
    return [*(rows[i] for i in order[:half]), between, *(rows[i] for i in order[-half:])]


def _shared_images(labels: Labels) -> Finding:
    """The same file in both splits makes AP too good."""
    train = {s.digest: s.name for s in labels.seen["train"]}
    both = [(train[s.digest], s.name) for s in labels.seen["val"] if s.digest in train]
    check, compared = "images in both splits", min(len(s) for s in labels.seen.values())
    if not both:
        twice = len(labels.seen["train"]) - len(train)
        told = f"none among those read ({compared} or more each, by content)"
        more = f"; {twice} of train are there twice" if twice else ""
        return Finding(check=check, found=told + more, verdict="note" if twice else "ok")
    pairs = ", ".join(f"{a} = {b}" for a, b in both[:3])
    told = f"{len(both)} of val are in train too, byte for byte ({pairs}{', ...' if len(both) > 3 else ''})"
    return Finding(check=check, found=told, verdict="warn", change=f"{told}: take them out of one, or AP is too good")


def _epochs(config: RunConfig, labels: Labels) -> Finding:
    epochs = config.optim.steps * config.optim.batch / labels.sources["train"].count
    told = f"{config.optim.steps} steps of {config.optim.batch} images show each image {epochs:.1f} times"
    if epochs >= 1:
        return Finding(check="schedule", found=told)
    enough = -(-labels.sources["train"].count // config.optim.batch)
    return Finding(check="schedule", found=told, verdict="warn", change=f"{told}: optim.steps={enough} is one epoch")
