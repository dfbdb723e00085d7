"""Pascal VOC's own numbers, as its development kit computes them (Everingham et al., IJCV 2010, section 4.2; VOCdevkit
`VOCevaldet`): AP of each class at IoU 0.5, averaged over classes.

A detection is held against the object of its class that it covers best, whether that is taken or not: a second
detection of an object is wrong, and one of a difficult object counts neither way. VOC's boxes hold their last pixel;
records keep them as [xmin - 1, xmax], whose plain IoU is the same. Shape letters: N objects, D detections.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from kd.detectors.base import Detections
from kd.evaluation.coco import check_complete
from kd.evaluation.curve import area
from kd.evaluation.truth import GroundTruth, ImageLabels


@dataclass(frozen=True)
class _Found:
    """One class in one image."""

    objects: int
    """Those that have to be found."""
    scores: np.ndarray
    """(D,) of the detections that count."""
    right: np.ndarray
    """(D,) bool."""


def evaluate(truth: GroundTruth, detections: Mapping[int, Detections], iou: float = 0.5) -> dict[str, float]:
    """`AP` as since VOC2010 (area under the precision's envelope) and `AP_2007` (eleven recalls), in [0, 1]; means over
    the classes that have an object to find, -1 where none has.

    `detections` (image id -> original pixels) must cover the truth's images exactly.
    """
    check_complete(detections, truth.image_ids)
    areas, elevens = [], []
    for label in range(len(truth.categories)):
        found = [_in_image(image, detections[image.image_id], label, iou) for image in truth.images]
        objects = sum(one.objects for one in found)
        if objects:
            right = _best_first(found)
            areas.append(area(right, objects))
            elevens.append(_eleven(right, objects))
    means = (float(np.mean(values)) if values else -1.0 for values in (areas, elevens))
    return dict(zip(("AP", "AP_2007"), means, strict=True))


def _in_image(image: ImageLabels, found: Detections, label: int, iou: float) -> _Found:
    of_class = image.labels == label
    boxes, difficult = torch.from_numpy(image.boxes[of_class]).double(), image.difficult[of_class]
    mine = found.labels.cpu() == label
    scores = found.scores.cpu()[mine].numpy()
    order = np.argsort(-scores, kind="stable")
    if not len(boxes) or not len(order):
        return _Found(int((~difficult).sum()), scores[order], np.zeros(len(order), np.bool_))
    overlap = box_iou(found.boxes.cpu()[mine].double()[torch.from_numpy(order)], boxes).numpy()
    best = overlap.argmax(1)
    covered = overlap[np.arange(len(best)), best] >= iou
    # Of the detections that cover one object, the first is right.
    right = np.zeros(len(best), np.bool_)
    hits = np.flatnonzero(covered)
    right[hits[np.unique(best[hits], return_index=True)[1]]] = True
    counts = ~(covered & difficult[best])
    return _Found(int((~difficult).sum()), scores[order][counts], right[counts])


def _best_first(found: Iterable[_Found]) -> np.ndarray:
    """The hits of all images, (D,) bool by falling score."""
    images = list(found)
    order = np.argsort(-np.concatenate([one.scores for one in images]), kind="stable")
    return np.concatenate([one.right for one in images])[order]


def _eleven(right: np.ndarray, objects: int) -> float:
    """The mean of the best precision at recalls of at least 0, 0.1, ..., 1 (VOC2007)."""
    hits = np.cumsum(right)
    recall, precision = hits / objects, hits / np.arange(1, len(right) + 1)
    # Recalls are quotients of integers: 3/10 must reach 0.3.
    best = [precision[recall >= tenth / 10 - 1e-12].max(initial=0.0) for tenth in range(11)]
    return float(np.mean(best))
