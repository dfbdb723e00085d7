"""COCO JSON and every data set in its format (HIT-UAV's strict JSON, pose sets, most exporters).

Standard: bbox is x, y, width, height in pixels of the upright image; `iscrowd` marks crowds. An annotation with
`"ignore": 1`, or of a category in `ignore_categories`, is a region in which nothing counts.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_sharding.datasets._boxes import clip
from data_sharding.datasets._coco_check import Usable, check, corners, read_json
from data_sharding.datasets._image_files import read_image
from data_sharding.datasets.base import SPLITS, Source, configured, split_of
from data_sharding.problems import OnBad, Problems
from data_sharding.record import Category, Record


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where one split lies."""

    images: Path
    """The folder that `file_name` is relative to."""
    annotations: Path
    """The JSON file."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A data set in COCO's format. All splits must name the same categories."""

    name: Literal["coco"] = "coco"
    train: Split | None = None
    val: Split | None = None
    test: Split | None = None
    ignore_categories: tuple[str, ...] = ()
    """Categories that are no classes: their boxes become ignored regions (HIT-UAV: DontCare)."""
    on_bad: OnBad = "stop"
    """What to do about unusable images and annotations: stop and tell them all, or skip them and write a report."""


def categories(config: Config) -> tuple[Category, ...]:
    """The classes, by category id, without the ignored ones. A class's label is its position.

    Raises ValueError where no split is configured, the file is not COCO, or an ignored category is not in it.
    """
    splits = configured(config)
    if not splits:
        raise ValueError(f"data set coco: none of {', '.join(SPLITS)} is set; set at least one")
    path = getattr(config, splits[0]).annotations
    return _classes(config, read_json(path), path)


def source(config: Config, split: str) -> Source:
    """Read and check the labels of a split.

    Raises ValueError where the split is not configured or empty and, in one message for the whole split, for every
    kind of unusable content with its count and the first ten places, unless `on_bad` is skip.
    """
    where: Split = split_of(config, split)
    content = read_json(where.annotations)
    classes = _classes(config, content, where.annotations)
    if split != configured(config)[0] and classes != categories(config):
        raise ValueError(f"{where.annotations} names other categories than the first split: {classes}")
    problems = Problems(where.annotations, config.on_bad)
    usable = check(content, where.images, problems)
    problems.stop_if_any()
    labels = {c.id: label for label, c in enumerate(classes)}
    kept = [a for annotations in usable.annotations.values() for a in annotations]
    shape = _Shape(
        segmentations=any(a.get("segmentation") for a in kept),
        keypoints=max((len(a["keypoints"]) // 3 for a in kept if "keypoints" in a), default=None),
    )
    read = partial(_read, usable, labels, shape, where.images)
    fingerprint = _fingerprint(config, usable, content["categories"])
    return Source(count=len(usable.images), fingerprint=fingerprint, read=read, problems=problems)


def records(config: Config, split: str) -> Iterator[Record]:
    """Every image of a split, in the file's order; also those without objects."""
    return iter(source(config, split))


@dataclass(frozen=True)
class _Shape:
    """What the annotations of a split carry."""

    segmentations: bool
    keypoints: int | None


def _classes(config: Config, content: dict[str, Any], path: Path) -> tuple[Category, ...]:
    named = {c["name"] for c in content["categories"]}
    missing = set(config.ignore_categories) - named
    if missing:
        raise ValueError(f"ignore_categories {sorted(missing)}: not in {path}, which has {sorted(named)}")
    kept = [c for c in content["categories"] if c["name"] not in config.ignore_categories]
    if not kept:
        raise ValueError(f"{path} has no category that is a class; its categories are {sorted(named)}")
    return tuple(sorted((Category(c["id"], c["name"]) for c in kept), key=lambda c: c.id))


def _fingerprint(config: Config, usable: Usable, classes: list[Any]) -> str:
    annotations = list(usable.annotations.items())
    told = [sorted(config.ignore_categories), usable.images, annotations, classes, usable.sizes]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read(usable: Usable, labels: dict[int, int], shape: _Shape, folder: Path, position: int) -> Record:
    image = usable.images[position]
    width, height = image["width"], image["height"]
    annotations = usable.annotations[image["id"]]
    ignored = [bool(a.get("ignore")) or a["category_id"] not in labels for a in annotations]
    objects = [a for a, skip in zip(annotations, ignored, strict=True) if not skip]
    regions = [a for a, skip in zip(annotations, ignored, strict=True) if skip]
    boxes = _boxes(objects, width, height)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    areas = [a.get("area", area) for a, area in zip(objects, own.tolist(), strict=True)]
    return Record(
        image_id=image["id"],
        file_name=image["file_name"],
        width=width,
        height=height,
        image=read_image(folder, image["file_name"], (width, height)),
        boxes=boxes,
        labels=np.array([labels[a["category_id"]] for a in objects], np.int64),
        annotation_ids=np.array([a["id"] for a in objects], np.int64),
        areas=np.array(areas, np.float32),
        crowd=np.array([bool(a.get("iscrowd")) for a in objects], np.bool_),
        difficult=np.zeros(len(objects), np.bool_),
        ignore_regions=_boxes(regions, width, height),
        segmentations=tuple(_segmentation(a) for a in objects) if shape.segmentations else (),
        keypoints=None if shape.keypoints is None else _keypoints(objects, shape.keypoints),
    )


def _boxes(annotations: list[dict[str, Any]], width: int, height: int) -> np.ndarray:
    return clip([corners(a["bbox"]) for a in annotations], width, height)


def _segmentation(annotation: dict[str, Any]) -> str:
    return json.dumps(annotation.get("segmentation", []), separators=(",", ":"))


def _keypoints(objects: list[dict[str, Any]], count: int) -> np.ndarray:
    points = [a.get("keypoints") or [0] * (3 * count) for a in objects]
    return np.array(points, np.float32).reshape(-1, count, 3)
