"""Outputs that say exactly what the labels say, for each detector plug-in: what its coding means, written down once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_sharding.batch import Batch, Geometry, Outputs
from kd.blocks import points as pts
from kd.blocks.dense import one_hot
from kd.blocks.region_targets import region_targets
from kd.detectors import faster_rcnn, fcos, retinanet
from kd.detectors.base import Detector
from tests.kd.detecting import CLASSES

FIT: dict[str, dict[str, Any]] = {
    "retinanet": {"anchor_sizes": (2.0, 3.0, 4.0)},
    "faster_rcnn": {"anchor_sizes": (2.0, 4.0), "roi_width": 64, "roi_samples": 32, "roi_positives": 0.5},
}
"""What a plug-in needs to learn three objects of 6 to 20 pixels in 80 steps."""


def outputs(d: Detector, b: Batch, shift: float = 0.0) -> Outputs:
    """Perfect classes, and box codes that are `shift` off in each of the four numbers."""
    return PERFECT[type(d)](d, b, shift)


def unit(d: Detector, b: Batch) -> float:
    """The bounded box loss of outputs that are off by a half in each number."""
    if not isinstance(d, faster_rcnn.FasterRCNN):
        return 1.0
    regions = region_targets(outputs(d, b).proposals, b).positive.sum() / (len(b) * d.config.roi_samples)
    return float(regions + b.totals["positives"] / b.totals["anchors"])


def found(d: Detector, o: Outputs, geometry: Geometry) -> list[Tensor]:
    """The boxes that the maps lead to: detections, or the first stage's proposals."""
    if isinstance(d, faster_rcnn.FasterRCNN):
        return list(d._propose(o.class_logits, o.box_deltas, geometry))
    return [one.boxes for one in d.detect(o, geometry)]


def _fcos(d: fcos.FCOS, b: Batch, shift: float) -> Outputs:
    targets = d._targets(b)
    xy, stride, boxes = targets.of_positives()
    logits = one_hot(targets.matched, targets.labels, CLASSES) * 20 - 10
    distances = torch.zeros(*targets.matched.shape, 4)
    distances[targets.positive] = pts.encode(xy, stride, boxes) + shift
    shapes = targets.points.shapes
    return Outputs(_maps(logits, shapes), _maps(distances, shapes), _maps(torch.full_like(logits[..., :1], 5), shapes))


def _retinanet(d: retinanet.RetinaNet, b: Batch, shift: float) -> Outputs:
    targets = d._targets(b)
    codes = torch.zeros(*targets.matched.shape, 4)
    codes[targets.positive] = d._truth(targets) + shift
    logits = one_hot(targets.matched, targets.labels, CLASSES) * 20 - 10
    shapes, per_cell = targets.anchors.shapes, targets.anchors.per_cell
    return Outputs(_maps(logits, shapes, per_cell), _maps(codes, shapes, per_cell))


def _faster_rcnn(d: faster_rcnn.FasterRCNN, b: Batch, shift: float) -> Outputs:
    """The regions are the boxes, moved by a pixel so that there is something to say."""
    targets = d._anchor_targets(b)
    anchors, boxes = targets.of_positives()
    codes = torch.zeros(*targets.matched.shape, 4)
    codes[targets.positive] = d.anchor_coder.encode_single(boxes, anchors) + shift
    shapes, per_cell = targets.anchors.shapes, targets.anchors.per_cell
    objectness = targets.positive[..., None].float() * 20 - 10
    proposals = tuple(x + 0.5 for x in b.boxes)
    regions = region_targets(proposals, b)
    deltas = torch.zeros(len(regions.boxes), CLASSES + 1, 4)
    deltas[regions.positive, regions.labels[regions.positive]] = d._region_codes(regions) + shift
    logits = torch.eye(CLASSES + 1)[regions.labels] * 20
    maps = _maps(objectness, shapes, per_cell), _maps(codes, shapes, per_cell)
    return Outputs(*maps, (), proposals, logits, deltas.flatten(1))


PERFECT: dict[type, Callable[[Any, Batch, float], Outputs]] = {
    fcos.FCOS: _fcos,
    retinanet.RetinaNet: _retinanet,
    faster_rcnn.FasterRCNN: _faster_rcnn,
}


def _maps(rows: Tensor, shapes: tuple[tuple[int, int], ...], per_cell: int = 1) -> tuple[Tensor, ...]:
    """(B, L, C) -> one (B, A * C, H, W) map per level."""
    levels = rows.split([height * width * per_cell for height, width in shapes], dim=1)
    return tuple(
        level.unflatten(1, (height, width, per_cell)).permute(0, 3, 4, 1, 2).flatten(1, 2)
        for level, (height, width) in zip(levels, shapes, strict=True)
    )
