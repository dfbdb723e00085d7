"""FCOS (Tian et al., ICCV 2019 and TPAMI 2020, arXiv:1904.01355, arXiv:2006.09214) for small objects.

Head, losses and coding are torchvision's, under torchvision's parameter names (`from_torchvision`). Our own: any run
of levels P2..P7, an assignment that leaves no small box without a location, and regions in which nothing counts.
Locations on the padding take part neither in losses nor in detection: the padding would otherwise teach background.

Shape letters: B images, K classes, L locations of all levels, P positive locations of the micro-batch, M boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from data_sharding.batch import Batch, Geometry, Outputs
from kd.backbones.base import Backbone
from kd.blocks import distribution
from kd.blocks import points as pts
from kd.blocks.answers import Answers, of_all_images
from kd.blocks.assign import assign
from kd.blocks.dense import best_of_levels, flat, keep_rows, one_hot, suppressed
from kd.blocks.distribution import check_bins
from kd.blocks.response import box_error, soft_classes
from kd.blocks.towers import Towers
from kd.detectors._torchvision import our_names
from kd.detectors.base import Detections, DetectorConfig, PyramidDetector, build_backbone


@dataclass(frozen=True, kw_only=True)
class Config(DetectorConfig):
    """Settings of an FCOS detector. A detection's score is sqrt(class x centerness)."""

    name: Literal["fcos"] = "fcos"
    nms: float = 0.6
    center_radius: float = 1.5
    """Locations closer than so many strides to a box's centre are positive."""
    nearest: bool = True
    """Whether a box without any such location (smaller than a stride, very thin) gets its nearest one."""
    point_offset: float = 0.0
    """Where a location lies in its cell, in cells. torchvision's anchors use 0 (the middle of a ResNet cell's
    receptive field), the paper 0.5; weights and teachers of response distillation must agree on it."""
    bins: int | None = None
    """Every side of a box is a distribution over distances of 0..bins strides (GFL's is 16), learnt with a distribution
    focal loss beside the GIoU; null: a number. The method `ld` needs it, equal on both sides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bins(self.bins)
        if not 0 <= self.point_offset <= 1:
            raise ValueError(f"point_offset must be in [0, 1], got {self.point_offset}")
        if not 0.5 <= self.center_radius <= 16:
            raise ValueError(f"center_radius must be in [0.5, 16] strides, got {self.center_radius}")


@dataclass(frozen=True)
class Targets:
    """What the labels of a micro-batch ask of every location."""

    points: pts.Points
    matched: Tensor
    """(B, L) int64 index into the boxes of all images, or -1."""
    boxes: Tensor
    """(M, 4) float32, all images' boxes one after the other."""
    labels: Tensor
    """(M,) int64."""
    on_image: Tensor
    """(B, L) bool: not on the padding."""

    @property
    def positive(self) -> Tensor:
        """(B, L) bool."""
        return self.matched >= 0

    def of_positives(self) -> tuple[Tensor, Tensor, Tensor]:
        """(P, 2) locations, (P,) strides and (P, 4) boxes of the positives, in the order of `x[positive]`."""
        location = self.positive.nonzero()[:, 1]
        return self.points.xy[location], self.points.stride[location], self.boxes[self.matched[self.positive]]


class FCOS(PyramidDetector):
    """Backbone, pyramid, head."""

    def __init__(self, config: Config, num_classes: int, backbone: Backbone) -> None:
        places = (f"point_offset {config.point_offset}",)
        super().__init__(config, num_classes, backbone, "p5", places, bins=config.bins)
        self.config = config
        self.head = Towers(config.width, config.head_depth, num_classes, config.bins)

    def predict(
        self,
        pyramid: tuple[Tensor, ...],
        geometry: Geometry,
        proposals: tuple[Tensor, ...] | None = None,
        sampling: Batch | None = None,
    ) -> Outputs:
        """See `Detector.predict`. `box_deltas` are distances in strides, after the ReLU, as torchvision's, or with
        `bins` the logits of their distributions."""
        return Outputs(*self.head(pyramid))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`positives`: locations that answer for a box."""
        return {"positives": self._targets(batch).positive.sum().float()}

    def task_losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Focal, GIoU, centerness and, with `bins`, distribution focal loss, each the sum over locations / positives of
        the global batch.

        Locations in ignored regions that answer for no box are left out of the focal loss.
        """
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        logits, distances, centerness = _flat(outputs, targets.points)
        positive = targets.positive
        counted = positive | (targets.on_image & ~targets.points.inside_any(batch.ignore))
        hot = one_hot(targets.matched, targets.labels, self.shapes.num_classes)
        focal = sigmoid_focal_loss(logits, hot, alpha=0.25, gamma=2.0, reduction="none")
        xy, stride, boxes = targets.of_positives()
        giou = generalized_box_iou_loss(pts.decode(xy, stride, distances[positive]), boxes, reduction="sum")
        wanted = pts.centerness(pts.encode(xy, stride, boxes))
        inside = F.binary_cross_entropy_with_logits(centerness[positive], wanted, reduction="sum")
        losses = {"cls": (focal.sum(-1) * counted).sum() * share, "box": giou * share, "centerness": inside * share}
        edges = _edges(outputs, targets.points)
        if edges is None:
            return losses
        spread = distribution.focal(edges[positive], pts.encode(xy, stride, boxes)).mean(-1).sum()
        return losses | {"dfl": distribution.DFL * spread * share}

    def distill_losses(self, student: Outputs, target: Outputs, batch: Batch, box_loss: str) -> dict[str, Tensor]:
        """See `Detector.distill_losses`. Both terms are sums / positives of the global batch.

        `cls` covers every location of the image (ignored regions too: the target knows what is there), not the padding.
        Box errors are in strides, summed over the four sides.
        """
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        logits, distances, _ = _flat(student, targets.points)
        soft, wanted, _ = (x.detach() for x in _flat(target, targets.points))
        truth = pts.encode(*targets.of_positives()).clamp(min=0)  # the head cannot say less than 0
        box = box_error(distances[targets.positive], wanted[targets.positive], truth, box_loss)
        cls = soft_classes(logits, soft).sum(-1) * targets.on_image
        return {"cls": cls.sum() * share, "box": box * share}

    def answers(self, outputs: Outputs, batch: Batch) -> Answers:
        """See `Detector.answers`."""
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        points, count = targets.points, len(batch)
        edges = _edges(outputs, points)
        logits, distances, _ = _flat(outputs, points)
        matched = targets.matched, targets.on_image, targets.labels, share
        common = of_all_images((logits, distances), pts.squares(points, 8), *matched)
        flat_edges = None if edges is None else edges.flatten(0, 1)
        xy, stride = points.xy.repeat(count, 1), points.stride.repeat(count)
        decode, lengths = partial(pts.decode, xy, stride), tuple(rows * columns for rows, columns in points.shapes)
        return Answers(**common, regions=False, decode=decode, lengths=lengths, edges=flat_edges)

    @torch.no_grad()
    def detect(self, outputs: Outputs, geometry: Geometry) -> list[Detections]:
        """See `Detector.detect`. Boxes without area are dropped."""
        points = self._points(geometry)
        logits, distances, centerness = _flat(outputs, points)
        scores = (logits.sigmoid() * centerness.sigmoid()[..., None]).sqrt()
        scores = scores * points.inside_images(geometry.sizes)[..., None]
        boxes = pts.decode(points.xy, points.stride, distances)
        lengths, classes = [rows * columns for rows, columns in points.shapes], self.shapes.num_classes
        found = []
        for s, b, (height, width) in zip(scores, boxes, geometry.sizes.tolist(), strict=True):
            index = best_of_levels(s, lengths, self.config.candidates, self.config.score_threshold)
            best = b[index // classes], s.flatten()[index], index % classes
            found.append(Detections(*suppressed(*best, (height, width), self.config.nms, self.config.detections)))
        return found

    def _keep_classes(self, classes: Sequence[int]) -> None:
        keep_rows(self.head.classification_head.cls_logits, classes)

    def _points(self, geometry: Geometry) -> pts.Points:
        return pts.grid(geometry.canvas, self.shapes.strides, self.config.point_offset, geometry.sizes.device)

    def _targets(self, batch: Batch) -> Targets:
        points, sizes = self._points(batch.geometry), batch.geometry.sizes
        boxes, labels = torch.cat(batch.boxes), torch.cat(batch.labels)
        counts = torch.tensor([len(b) for b in batch.boxes], device=sizes.device)
        image = torch.repeat_interleave(counts, output_size=len(boxes))
        matched = assign(boxes, image, sizes, points, self.config.center_radius, self.config.nearest)
        return Targets(points, matched, boxes, labels, points.inside_images(sizes))


def build(config: Config, num_classes: int, weights_follow: bool = False) -> FCOS:
    """A new detector with the random state of the caller. With `weights_follow` the caller loads a whole state dict
    next, so `backbone.weights` is neither read nor asked for."""
    return FCOS(config, num_classes, build_backbone(config.backbone, weights_follow))


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `torchvision.models.detection.fcos_*_fpn` under our names: levels 3-7, width 256, depth 4."""
    return our_names(state)


def _flat(outputs: Outputs, points: pts.Points) -> tuple[Tensor, Tensor, Tensor]:
    """Maps -> float32 class logits (B, L, K), distances (B, L, 4), centerness logits (B, L)."""
    logits = flat(outputs.class_logits, points.shapes, outputs.class_logits[0].shape[1])
    distances, _ = distribution.sides(_boxes(outputs, points))
    return logits, distances, flat(outputs.centerness, points.shapes, 1).squeeze(-1)


def _edges(outputs: Outputs, points: pts.Points) -> Tensor | None:
    """(B, L, 4, E) logits of the distributions, where there are any."""
    return distribution.sides(_boxes(outputs, points))[1]


def _boxes(outputs: Outputs, points: pts.Points) -> Tensor:
    return flat(outputs.box_deltas, points.shapes, outputs.box_deltas[0].shape[1])
