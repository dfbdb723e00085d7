"""The labels of a split as evaluations need them: in original image pixels, without any pixels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.record import Category, Record

_NO_SIZE = -1.0
"""px^2: an area in no size range."""


@dataclass(frozen=True, kw_only=True)
class ImageLabels:
    """What `Record` says of one image, without its bytes."""

    image_id: int
    width: int
    height: int
    boxes: np.ndarray
    """(N, 4) float32 as x1 y1 x2 y2."""
    labels: np.ndarray
    """(N,) int64."""
    difficult: np.ndarray
    """(N,) bool."""
    ignore_regions: np.ndarray
    """(R, 4) float32."""

    @staticmethod
    def of(record: Record) -> "ImageLabels":
        """The labels of a record. Crowds become ignored regions: only COCO's evaluation knows them."""
        there = ~record.crowd
        return ImageLabels(
            image_id=record.image_id,
            width=record.width,
            height=record.height,
            boxes=record.boxes[there],
            labels=record.labels[there],
            difficult=record.difficult[there],
            ignore_regions=np.concatenate([record.ignore_regions, record.boxes[record.crowd]]),
        )


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The labels of a split in original image pixels, in pycocotools' form, without any pixels."""

    categories: tuple[Category, ...]
    """The class of label i is the i-th."""
    image_ids: tuple[int, ...]
    images: tuple[ImageLabels, ...]
    """The same labels image by image, for other evaluations than COCO's."""
    annotations: tuple[dict[str, Any], ...]

    @staticmethod
    def from_records(records: Iterable[Record], categories: Sequence[Category]) -> "GroundTruth":
        """Read the labels of `records`, one at a time.

        Crowds become `iscrowd`. Every ignored region becomes a crowd of every class: a detection that lies in it to the
        IoU threshold's share of its own area, and matches no object, counts neither way.

        Difficult objects (Pascal VOC) need not be found, and a detection of one counts neither way. pycocotools
        overwrites `ignore`, but ignores what is of no size range: that is the area they get. The second detection of
        one difficult object counts as wrong here, unlike in VOC's own evaluation.
        """
        ids: list[int] = []
        images: list[ImageLabels] = []
        annotations: list[dict[str, Any]] = []
        for record in records:
            ids.append(record.image_id)
            images.append(ImageLabels.of(record))
            areas = np.where(record.difficult, _NO_SIZE, record.areas)
            for box, label, area, crowd in zip(record.boxes, record.labels, areas, record.crowd, strict=True):
                annotations.append(
                    _annotation(record.image_id, box, categories[int(label)].id, float(area), bool(crowd))
                )
            for region in record.ignore_regions:
                annotations += [_annotation(record.image_id, region, c.id, _area(region), True) for c in categories]
        if len(set(ids)) != len(ids):
            raise ValueError(f"image ids must be unique, {len(ids) - len(set(ids))} of {len(ids)} are repeated")
        return GroundTruth(
            categories=tuple(categories), image_ids=tuple(ids), images=tuple(images), annotations=tuple(annotations)
        )

    def subset(self, image_ids: Iterable[int]) -> "GroundTruth":
        """The same labels for some of the images only."""
        wanted = set(image_ids)
        unknown = sorted(wanted - set(self.image_ids))
        if unknown:
            raise ValueError(f"no images with ids {unknown[:5]} among the {len(self.image_ids)} of the ground truth")
        return GroundTruth(
            categories=self.categories,
            image_ids=tuple(i for i in self.image_ids if i in wanted),
            images=tuple(i for i in self.images if i.image_id in wanted),
            annotations=tuple(a for a in self.annotations if a["image_id"] in wanted),
        )


def _annotation(image_id: int, box: np.ndarray, category_id: int, area: float, crowd: bool) -> dict[str, Any]:
    corners = [float(x) for x in box]
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": xywh(corners),
        "area": area,
        "iscrowd": int(crowd),
        "ignore": 0,
    }


def xywh(box: Sequence[float]) -> list[float]:
    """x1 y1 x2 y2 -> x y width height."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
