"""What is likely wrong with a teacher that missed its gate: its classes, its pixel statistics, or its weights."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torchvision.ops import box_iou

from cluster.build import Split
from cluster.scoring import score
from cluster.sections import EvaluationConfig
from data_sharding.record import Category
from data_sharding.world import World
from kd.detectors.base import Detections, Detector
from kd.evaluation import coco
from kd.evaluation.truth import GroundTruth

STATISTICS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "those of pixels in 0..1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "those of pixels in -1..1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "those of pixels in 0..255": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "Caffe's": ((0.485, 0.456, 0.406), (1 / 255, 1 / 255, 1 / 255)),
}
"""What detectors are commonly trained with: mean and std of RGB in 0..1."""
LOOK = 100
"""Images on which a suspicion is tried out."""


def suspicion(
    detector: Detector,
    val: Split,
    truth: GroundTruth,
    config: EvaluationConfig,
    *,
    device: torch.device,
    factor: int,
    needed: float,
) -> str:
    """One sentence on why `detector` misses an AP of `needed` on the images of `truth` (the split's first ones).

    Tried in this order: whether its boxes are right and only their classes are not, whether other pixel statistics make
    it see. A detector that neither helps has the wrong weights.
    """
    images = min(LOOK, len(truth.image_ids))
    truth = truth.subset(sorted(truth.image_ids)[:images])

    def seen() -> tuple[float, dict[int, Detections]]:
        found = score(detector, val, truth, config, world=World(), device=device, factor=factor, first=images)
        return found.metrics["AP"], found.detections

    own, detections = seen()
    anything = 100 * coco.evaluate(_nameless(truth), _unlabelled(detections), max_dets=config.max_dets)["AP"]
    if anything >= needed and anything >= 2 * own:
        return (
            f"whatever it calls them, it finds the objects (AP {anything:.1f} if classes are not looked at, {own:.1f} "
            f"if they are): its classes are named or ordered otherwise{_confused(truth, detections)}; say with "
            "teachers.N.classes what it calls each class"
        )
    tried = {}
    for name, (mean, std) in STATISTICS.items():
        with _statistics(detector, mean, std):
            tried[name] = seen()[0]
    best = max(tried, key=lambda name: tried[name])
    if tried[best] >= needed and tried[best] >= 2 * own:
        mean, std = STATISTICS[best]
        return (
            f"with other pixel statistics, {best} (mean {_rounded(mean)}, std {_rounded(std)}), it reaches AP "
            f"{tried[best]:.1f} instead of {own:.1f}: its mean and std are not those that it was trained with"
        )
    return (
        f"neither other pixel statistics (at best AP {tried[best]:.1f}) nor forgetting the classes (AP {anything:.1f}) "
        "helps: its weights are random, of an early checkpoint, or of other objects, or its objects have another size"
    )


def _nameless(truth: GroundTruth) -> GroundTruth:
    """The same boxes, all of one class."""
    one = truth.categories[0]
    return GroundTruth(
        categories=(Category(id=one.id, name="anything"),),
        image_ids=truth.image_ids,
        images=truth.images,
        annotations=tuple({**a, "category_id": one.id} for a in truth.annotations),
    )


def _unlabelled(detections: Mapping[int, Detections]) -> dict[int, Detections]:
    return {i: Detections(d.boxes, d.scores, torch.zeros_like(d.labels)) for i, d in detections.items()}


def _confused(truth: GroundTruth, detections: Mapping[int, Detections]) -> str:
    """`: 'car' is mostly called 'bus', ...` for the classes that are mostly called otherwise."""
    number = {category.id: i for i, category in enumerate(truth.categories)}
    called: dict[int, Counter[int]] = {i: Counter() for i in number.values()}
    for annotation in truth.annotations:
        found = detections[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        overlap = box_iou(found.boxes.new_tensor([[x, y, x + width, y + height]]), found.boxes)[0]
        if len(overlap) and overlap.max() >= 0.5:
            best = torch.where(overlap >= 0.5, found.scores, -1).argmax()
            called[number[annotation["category_id"]]][int(found.labels[best])] += 1
    names = [category.name for category in truth.categories]
    pairs = [(mine, its.most_common(1)[0][0]) for mine, its in called.items() if its]
    told = [f"{names[mine]!r} is mostly called {names[its]!r}" for mine, its in pairs if mine != its]
    return f" ({', '.join(told[:3])})" if told else ""


@contextmanager
def _statistics(
    detector: Detector, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Iterator[None]:
    """Show it pixels that are standardised otherwise."""
    before = detector.mean.clone(), detector.std.clone()
    detector.mean.copy_(detector.mean.new_tensor(mean))
    detector.std.copy_(detector.std.new_tensor(std))
    try:
        yield
    finally:
        detector.mean.copy_(before[0])
        detector.std.copy_(before[1])


def _rounded(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values) + "]"
