"""COCO's box metrics (pycocotools), with finer size ranges for small objects and any cap on detections.

Shape letters: T IoU thresholds, R recall points, K classes, A size ranges, M detection caps.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_sharding.record import Category
from kd.detectors.base import Detections
from kd.evaluation.truth import GroundTruth, xywh

_FAR = 1e5
_COCO_SIZES = {"all": (0.0, _FAR), "small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, _FAR)}
FINE_SIZES: dict[str, tuple[float, float]] = {"0_8": (0, 8), "8_16": (8, 16), "16_32": (16, 32)}
"""Size ranges within COCO's `small`: name -> (least, greatest) side in pixels, compared as squares with the area."""


def size_classes(edges: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Rising edges in pixels -> named size ranges from 0: (8, 16) -> {"0_8": (0, 8), "8_16": (8, 16)}."""
    return {f"{low}_{high}": (float(low), float(high)) for low, high in zip((0, *edges), edges, strict=False)}


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
            {"image_id": image_id, "category_id": categories[label].id, "bbox": xywh(box), "score": score}
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
