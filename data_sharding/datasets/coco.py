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

from data_sharding.datasets._coco_check import Problems, check, read_json
from data_sharding.datasets.base import Source
from data_sharding.record import Category, Record

SPLITS = ("train", "val", "test")


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


def categories(config: Config) -> tuple[Category, ...]:
    """The classes, by category id, without the ignored ones. A class's label is its position.

    Raises ValueError where no split is configured, the file is not COCO, or an ignored category is not in it.
    """
    configured = _configured(config)
    if not configured:
        raise ValueError(f"data set coco: none of {', '.join(SPLITS)} is set; set at least one")
    path = getattr(config, configured[0]).annotations
    return _classes(config, read_json(path), path)


def source(config: Config, split: str) -> Source:
    """Read and check the labels of a split.

    Raises ValueError where the split is not configured or empty and, in one message for the whole split, for every
    kind of unusable content with its count and the first ten places.
    """
    where = getattr(config, split, None) if split in SPLITS else None
    if where is None:
        told = ", ".join(_configured(config)) or "none"
        raise ValueError(f"data set coco has no split {split!r}; configured: {told}")
    content = read_json(where.annotations)
    classes = _classes(config, content, where.annotations)
    if split != _configured(config)[0] and classes != categories(config):
        raise ValueError(f"{where.annotations} names other categories than the first split: {classes}")
    problems = Problems(where.annotations)
    sizes = check(content, where.images, problems)
    problems.stop_if_any()
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    labels = {c.id: label for label, c in enumerate(classes)}
    shape = _Shape(
        segmentations=any(a.get("segmentation") for a in content["annotations"]),
        keypoints=max((len(a["keypoints"]) // 3 for a in content["annotations"] if "keypoints" in a), default=None),
    )
    read = partial(_read, content["images"], by_image, labels, shape, where.images)
    return Source(count=len(sizes), fingerprint=_fingerprint(config, content, sizes), read=read)


def records(config: Config, split: str) -> Iterator[Record]:
    """Every image of a split, in the file's order; also those without objects."""
    return iter(source(config, split))


def _configured(config: Config) -> list[str]:
    return [split for split in SPLITS if getattr(config, split) is not None]


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
    kept = (c for c in content["categories"] if c["name"] not in config.ignore_categories)
    return tuple(sorted((Category(c["id"], c["name"]) for c in kept), key=lambda c: c.id))


def _fingerprint(config: Config, content: dict[str, Any], sizes: list[int]) -> str:
    told = [sorted(config.ignore_categories), content["images"], content["annotations"], content["categories"], sizes]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read(
    images: list[dict[str, Any]],
    by_image: dict[int, list[dict[str, Any]]],
    labels: dict[int, int],
    shape: _Shape,
    folder: Path,
    position: int,
) -> Record:
    image = images[position]
    width, height = image["width"], image["height"]
    annotations = by_image[image["id"]]
    ignored = [bool(a.get("ignore")) or a["category_id"] not in labels for a in annotations]
    objects = [a for a, skip in zip(annotations, ignored, strict=True) if not skip]
    regions = [a for a, skip in zip(annotations, ignored, strict=True) if skip]
    boxes = clipped(objects, width, height)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    areas = [a.get("area", area) for a, area in zip(objects, own.tolist(), strict=True)]
    return Record(
        image_id=image["id"],
        file_name=image["file_name"],
        width=width,
        height=height,
        image=(folder / image["file_name"]).read_bytes(),
        boxes=boxes,
        labels=np.array([labels[a["category_id"]] for a in objects], np.int64),
        annotation_ids=np.array([a["id"] for a in objects], np.int64),
        areas=np.array(areas, np.float32),
        crowd=np.array([bool(a.get("iscrowd")) for a in objects], np.bool_),
        difficult=np.zeros(len(objects), np.bool_),
        ignore_regions=clipped(regions, width, height),
        segmentations=tuple(_segmentation(a) for a in objects) if shape.segmentations else (),
        keypoints=None if shape.keypoints is None else _keypoints(objects, shape.keypoints),
    )


def clipped(annotations: list[dict[str, Any]], width: int, height: int) -> np.ndarray:
    """The annotations' boxes (N, 4) float32 as x1 y1 x2 y2 inside the image."""
    xywh = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    return corners.clip(0, [width, height, width, height]).astype(np.float32)


def _segmentation(annotation: dict[str, Any]) -> str:
    return json.dumps(annotation.get("segmentation", []), separators=(",", ":"))


def _keypoints(objects: list[dict[str, Any]], count: int) -> np.ndarray:
    points = [a.get("keypoints") or [0] * (3 * count) for a in objects]
    return np.array(points, np.float32).reshape(-1, count, 3)
