"""VisDrone-DET's own numbers, as the official toolkit computes them (VisDrone2018-DET-toolkit, `evalDET`).

Objects and detections that lie by half in ignored regions are dropped first; caps on detections count an image's best
over all classes (that is why AR1 is small); AP is the area under the precision's envelope. Shape letters: N objects,
D detections, T IoU thresholds, R regions.

Objects of score 0 among the ten classes would be ignored by class there; records keep them as ignored regions. The
official files have none. With `data.others: ignore` the objects of category 11 are ignored regions as well, which
spares detections of them; `ignore_in_training` and `background` leave the validation split as the toolkit reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from kd.detectors.base import Detections
from kd.evaluation.coco import check_complete
from kd.evaluation.curve import area
from kd.evaluation.truth import GroundTruth, ImageLabels

THRESHOLDS = tuple(np.arange(0.5, 1.0, 0.05).round(2))
CAPS = (1, 10, 100, 500)


@dataclass(frozen=True)
class _Matches:
    """One class in one image."""

    objects: int
    scores: np.ndarray
    """(D,) best first."""
    place: np.ndarray
    """(D,) place among the image's detections of all classes, best first from 0."""
    right: np.ndarray
    """(T, D) bool: whether a detection found an object."""


def evaluate(truth: GroundTruth, detections: Mapping[int, Detections]) -> dict[str, float]:
    """AP, AP50, AP75, AR1, AR10, AR100 and AR500 in [0, 1], and AP_classes, AP50_classes, AP75_classes.

    The toolkit takes a class as often into its mean as there are images that hold it; the numbers with `_classes` take
    each class that occurs once. `detections` (image id -> original pixels) must cover the truth's images exactly; caps
    of the evaluation below 500 cap these numbers as well. -1: no object anywhere.
    """
    check_complete(detections, truth.image_ids)
    by_class: dict[int, list[_Matches]] = {}
    weights = np.zeros(len(truth.categories))
    for image in truth.images:
        for label, matches in _matches(image, detections[image.image_id], len(truth.categories)).items():
            by_class.setdefault(label, []).append(matches)
            weights[label] += matches.objects > 0
    if not weights.any():
        return dict.fromkeys((*_NAMES, *(f"{name}_classes" for name in _NAMES[:3])), -1.0)
    found = np.stack([_class_numbers(by_class.get(label, [])) for label in range(len(weights))])
    official = np.average(found, axis=0, weights=weights)
    plain = found[weights > 0].mean(axis=0)
    numbers = dict(zip(_NAMES, official.tolist(), strict=True))
    return numbers | {f"{name}_classes": float(value) for name, value in zip(_NAMES[:3], plain, strict=False)}


_NAMES = ("AP", "AP50", "AP75", *(f"AR{cap}" for cap in CAPS))


def outside_ignored(boxes: np.ndarray, regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: which x1 y1 x2 y2 boxes lie less than half in the union of `regions` (R, 4); `size` is (h, w).

    In whole pixels counted from 1, off by one where the toolkit is: it decides about boxes at the edge.
    """
    if not len(regions):
        return np.ones(len(boxes), np.bool_)
    height, width = size
    painted = np.zeros(size, np.int64)
    for x1, y1, x2, y2 in np.round(regions).astype(int).tolist():
        left, top = max(1, x1), max(1, y1)
        right, bottom = left + max(1, x2 - x1), top + max(1, y2 - y1)
        painted[top - 1 : min(height, bottom), left - 1 : min(width, right)] = 1
    summed = painted.cumsum(0).cumsum(1)
    rounded = np.maximum(1, np.floor(_xywh(boxes) + 0.5)).astype(int)
    x, y = np.minimum(rounded[:, 0], width), np.minimum(rounded[:, 1], height)
    right, bottom = np.minimum(width, x + rounded[:, 2]), np.minimum(height, y + rounded[:, 3])
    covered = (
        summed[y - 1, x - 1] + summed[bottom - 1, right - 1] - summed[y - 1, right - 1] - summed[bottom - 1, x - 1]
    )
    return covered / (rounded[:, 2] * rounded[:, 3]) < 0.5


def _matches(image: ImageLabels, found: Detections, classes: int) -> dict[int, _Matches]:
    size = (image.height, image.width)
    boxes, scores, labels = (x.cpu().numpy() for x in (found.boxes.double(), found.scores, found.labels))
    order = np.argsort(-scores, kind="stable")
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    kept = outside_ignored(boxes, image.ignore_regions, size)
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    there = outside_ignored(image.boxes.astype(np.float64), image.ignore_regions, size)
    objects, classes_there = image.boxes[there].astype(np.float64), image.labels[there]
    return {
        label: _Matches(
            objects=int((classes_there == label).sum()),
            scores=scores[labels == label],
            place=np.flatnonzero(labels == label),
            right=_greedy(boxes[labels == label], objects[classes_there == label]),
        )
        for label in range(classes)
        if (labels == label).any() or (classes_there == label).any()
    }


def _greedy(boxes: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(D, 4) best first and (N, 4) -> (T, D) bool: each takes the free object that it covers best, of equals the last,
    if it covers it well enough."""
    right = np.zeros((len(THRESHOLDS), len(boxes)), np.bool_)
    if not len(objects) or not len(boxes):
        return right
    overlap = box_iou(torch.from_numpy(boxes), torch.from_numpy(objects)).numpy()
    free = np.ones((len(THRESHOLDS), len(objects)), np.bool_)
    rows, thresholds = np.arange(len(THRESHOLDS)), np.array(THRESHOLDS)
    for number in range(len(boxes)):
        open_ = np.where(free, overlap[number], -1.0)
        best = len(objects) - 1 - open_[:, ::-1].argmax(1)
        right[:, number] = open_[rows, best] >= thresholds
        free[rows[right[:, number]], best[right[:, number]]] = False
    return right


def _class_numbers(images: Sequence[_Matches]) -> np.ndarray:
    """(7,) of one class over all images, in the order of the names."""
    objects = max(1, sum(m.objects for m in images))
    if not images:
        return np.zeros(len(_NAMES))
    scores, place = np.concatenate([m.scores for m in images]), np.concatenate([m.place for m in images])
    right = np.concatenate([m.right for m in images], axis=1)
    recalls = [float((right & (place < cap)).sum(1).mean()) / objects for cap in CAPS]
    kept = place < CAPS[-1]
    order = np.argsort(-scores[kept], kind="stable")
    areas = [area(row, objects) for row in right[:, kept][:, order]]
    middle = [areas[THRESHOLDS.index(t)] for t in (0.5, 0.75)]
    return np.array([float(np.mean(areas)), *middle, *recalls])


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
