"""COCO's box metrics (pycocotools), with finer size ranges for small objects and any cap on detections.

Shape letters: T IoU thresholds, R recall points, K classes, A size ranges, M detection caps.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_sharding.record import Category, Record
from kd.detectors.base import Detections

_FAR = 1e5
_NO_SIZE = -1.0
"""px^2: an area in no size range."""
_COCO_SIZES = {"all": (0.0, _FAR), "small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, _FAR)}
FINE_SIZES: dict[str, tuple[float, float]] = {"0_8": (0, 8), "8_16": (8, 16), "16_32": (16, 32)}
"""Size ranges within COCO's `small`: name -> (least, greatest) side in pixels, compared as squares with the area."""


def size_classes(edges: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Rising edges in pixels -> named size ranges from 0: (8, 16) -> {"0_8": (0, 8), "8_16": (8, 16)}."""
    return {f"{low}_{high}": (float(low), float(high)) for low, high in zip((0, *edges), edges, strict=False)}


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The labels of a split in original image pixels, in pycocotools' form, without any pixels."""

    categories: tuple[Category, ...]
    """The class of label i is the i-th."""
    image_ids: tuple[int, ...]
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
        annotations: list[dict[str, Any]] = []
        for record in records:
            ids.append(record.image_id)
            areas = np.where(record.difficult, _NO_SIZE, record.areas)
            for box, label, area, crowd in zip(record.boxes, record.labels, areas, record.crowd, strict=True):
                annotations.append(
                    _annotation(record.image_id, box, categories[int(label)].id, float(area), bool(crowd))
                )
            for region in record.ignore_regions:
                annotations += [_annotation(record.image_id, region, c.id, _area(region), True) for c in categories]
        if len(set(ids)) != len(ids):
            raise ValueError(f"image ids must be unique, {len(ids) - len(set(ids))} of {len(ids)} are repeated")
        return GroundTruth(categories=tuple(categories), image_ids=tuple(ids), annotations=tuple(annotations))

    def subset(self, image_ids: Iterable[int]) -> "GroundTruth":
        """The same labels for some of the images only."""
        wanted = set(image_ids)
        unknown = sorted(wanted - set(self.image_ids))
        if unknown:
            raise ValueError(f"no images with ids {unknown[:5]} among the {len(self.image_ids)} of the ground truth")
        return GroundTruth(
            categories=self.categories,
            image_ids=tuple(i for i in self.image_ids if i in wanted),
            annotations=tuple(a for a in self.annotations if a["image_id"] in wanted),
        )


def evaluate(
    ground_truth: GroundTruth,
    detections: Mapping[int, Detections],
    *,
    max_dets: tuple[int, ...] = (1, 10, 100),
    sizes: Mapping[str, tuple[float, float]] = FINE_SIZES,
    per_class: bool = False,
) -> dict[str, float]:
    """COCO's numbers in [0, 1]: AP, AP50, AP75, AP_<size>, AR_<size>, AR<cap> for each cap, and AP_class/<name>
    with `per_class`. Everything but AR<cap> uses the greatest cap.

    `detections` (image id -> original image pixels, best first or not) must cover exactly the ground truth's images.
    -1 means, as in pycocotools, that there is no object to find (of that class or size): leave it out of means.
    """
    if not max_dets or min(max_dets) < 1 or sorted(set(max_dets)) != list(max_dets):
        raise ValueError(f"max_dets must be rising and at least 1, got {max_dets}")
    taken = sorted(sizes.keys() & _COCO_SIZES.keys())
    if taken:
        raise ValueError(f"sizes {taken} are COCO's own names; choose others")
    check_complete(detections, ground_truth.image_ids)
    ranges = {**_COCO_SIZES, **sizes}
    thresholds, precision, recall = _run(ground_truth, detections, max_dets, ranges)
    numbers = _summary(thresholds, precision, recall, max_dets, tuple(ranges))
    if per_class:
        by_id = sorted(ground_truth.categories, key=lambda c: c.id)  # pycocotools' own order
        numbers |= {f"AP_class/{c.name}": _mean(precision[:, :, k, 0, -1]) for k, c in enumerate(by_id)}
    return numbers


def to_original(detections: Detections, valid: tuple[int, int], original: tuple[int, int]) -> Detections:
    """Canvas pixels -> original image pixels, for views without crop and flip. Both sizes are (height, width): of the
    valid area on the canvas, and of the original image."""
    height, width = original
    factors = detections.boxes.new_tensor([width / valid[1], height / valid[0]]).repeat(2)
    limits = detections.boxes.new_tensor([width, height]).repeat(2)
    boxes = (detections.boxes * factors).clamp(min=0).minimum(limits)
    return Detections(boxes, detections.scores, detections.labels)


def to_coco_results(detections: Mapping[int, Detections], categories: Sequence[Category]) -> list[dict[str, Any]]:
    """COCO's result format, ready for JSON: image_id, category_id, bbox as x y width height, score."""
    results = []
    for image_id, found in detections.items():
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        results += [
            {"image_id": image_id, "category_id": categories[label].id, "bbox": _xywh(box), "score": score}
            for box, score, label in rows
        ]
    return results


def merge(parts: Iterable[Mapping[int, Detections]]) -> dict[int, Detections]:
    """The detections of all ranks by image id. Dummy images (id -1) are dropped; of an image that several ranks saw,
    the first rank's are kept."""
    merged: dict[int, Detections] = {}
    for part in parts:
        for image_id, found in part.items():
            if image_id != -1:
                merged.setdefault(image_id, found)
    return merged


def check_complete(found: Iterable[int], expected: Iterable[int]) -> None:
    """Refuse when images are missing, or are there that nobody asked for."""
    have, want = set(found), set(expected)
    missing, extra = sorted(want - have), sorted(have - want)
    if missing or extra:
        told = [
            f"{len(ids)} {kind} (ids {ids[:5]})" for kind, ids in (("missing", missing), ("unexpected", extra)) if ids
        ]
        raise ValueError(f"detections must cover the {len(want)} images of the split exactly: {', '.join(told)}")


def _run(
    ground_truth: GroundTruth,
    detections: Mapping[int, Detections],
    max_dets: tuple[int, ...],
    ranges: Mapping[str, tuple[float, float]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pycocotools: (T,) thresholds, (T, R, K, A, M) precision and (T, K, A, M) recall, -1 where undefined."""
    from pycocotools.cocoeval import COCOeval

    results = to_coco_results(detections, ground_truth.categories)
    found = [{**r, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress with print
        run = COCOeval(_index(ground_truth, ground_truth.annotations), _index(ground_truth, found), "bbox")
        run.params.imgIds = list(ground_truth.image_ids)
        run.params.catIds = [c.id for c in ground_truth.categories]
        run.params.maxDets = list(max_dets)
        run.params.areaRng = [[low**2, high**2] for low, high in ranges.values()]
        run.params.areaRngLbl = list(ranges)
        run.evaluate()
        run.accumulate()
    return run.params.iouThrs, run.eval["precision"], run.eval["recall"]


def _index(ground_truth: GroundTruth, annotations: Sequence[dict[str, Any]]) -> Any:
    """A pycocotools COCO object over `annotations`, numbered from 1: it takes id 0 for `no match`."""
    from pycocotools.coco import COCO

    coco: Any = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in ground_truth.image_ids],
        "categories": [{"id": c.id, "name": c.name} for c in ground_truth.categories],
        "annotations": [{**a, "id": i} for i, a in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _summary(
    thresholds: np.ndarray,
    precision: np.ndarray,
    recall: np.ndarray,
    max_dets: tuple[int, ...],
    ranges: tuple[str, ...],
) -> dict[str, float]:
    """What pycocotools' `summarize` computes, which knows caps of 1, 10 and 100 alone. Range 0 is `all`."""
    numbers = {"AP": _mean(precision[:, :, :, 0, -1])}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        numbers[name] = _mean(precision[np.isclose(thresholds, threshold)][:, :, :, 0, -1])
    for cap, number in enumerate(max_dets):
        numbers[f"AR{number}"] = _mean(recall[:, :, 0, cap])
    for index, name in enumerate(ranges[1:], start=1):
        numbers[f"AP_{name}"] = _mean(precision[:, :, :, index, -1])
        numbers[f"AR_{name}"] = _mean(recall[:, :, index, -1])
    return numbers


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _annotation(image_id: int, box: np.ndarray, category_id: int, area: float, crowd: bool) -> dict[str, Any]:
    corners = [float(x) for x in box]
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": _xywh(corners),
        "area": area,
        "iscrowd": int(crowd),
        "ignore": 0,
    }


def _xywh(box: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
