"""FCOS (Tian et al., ICCV 2019 and TPAMI 2020, arXiv:1904.01355, arXiv:2006.09214) for small objects.

Head, losses and coding are torchvision's, under torchvision's parameter names (`from_torchvision`). Our own: any run
of levels P2..P7, an assignment that leaves no small box without a location, and regions in which nothing counts.
Locations on the padding take part neither in losses nor in detection: the padding would otherwise teach background.

Shape letters: B images, K classes, L locations of all levels, P positive locations of the micro-batch, M boxes.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from data_sharding.batch import Batch, Geometry, Outputs, Taps
from kd.backbones import mobilenetv2
from kd.backbones.base import Backbone, evaluating
from kd.blocks import points as pts
from kd.blocks.assign import assign
from kd.blocks.fpn import FPN, check_levels
from kd.blocks.towers import Towers
from kd.detectors.base import AnyBackbone, Detections, Detector, Shapes
from kd.plugins import plugin


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an FCOS detector; the defaults are torchvision's where it has them."""

    name: Literal["fcos"] = "fcos"
    # The metadata tells whoever checks a recipe that `name` picks the member of the union.
    backbone: AnyBackbone = field(default_factory=mobilenetv2.Config, metadata={"discriminator": "name"})
    width: int = 256
    """Channels of pyramid and head."""
    head_depth: int = 4
    """3 x 3 convolutions before the last one, in each of the two towers."""
    levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    """Consecutive pyramid levels, within 2..7; level l has stride 2^l. Small objects want 2."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from RGB in 0..1; ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides RGB in 0..1."""
    center_radius: float = 1.5
    """Locations closer than so many strides to a box's centre are positive."""
    nearest: bool = True
    """Whether a box without any such location (smaller than a stride, very thin) gets its nearest one."""
    point_offset: float = 0.0
    """Where a location lies in its cell, in cells. torchvision's anchors use 0 (the middle of a ResNet cell's
    receptive field), the paper 0.5; weights and teachers of response distillation must agree on it."""
    score_threshold: float = 0.05
    """Detections of a lower score are dropped; the score is sqrt(class x centerness)."""
    candidates: int = 1000
    """Best (location, class) pairs per level before non-maximum suppression."""
    nms: float = 0.6
    """Boxes of one class that overlap more (IoU) are suppressed."""
    detections: int = 100
    """Most detections per image. Drone images hold hundreds of objects."""

    def __post_init__(self) -> None:
        check_levels(self.levels)
        for name, least in (("width", 4), ("head_depth", 0), ("candidates", 1), ("detections", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("score_threshold", "nms", "point_offset"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0.5 <= self.center_radius <= 16:
            raise ValueError(f"center_radius must be in [0.5, 16] strides, got {self.center_radius}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 numbers each, std above 0; got {self.mean} and {self.std}")


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


class FCOS(Detector):
    """Backbone, pyramid, head."""

    def __init__(self, config: Config, num_classes: int, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.fpn = FPN(backbone.channels, config.width, config.levels)
        self.head = Towers(config.width, config.head_depth, num_classes)
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)
        self.shapes = Shapes(
            c5_channels=backbone.channels[-1],
            c5_stride=backbone.strides[-1],
            pyramid_channels=config.width,
            strides=tuple(2**level for level in config.levels),
            num_classes=num_classes,
        )

    def features(self, images: Tensor, freeze_backbone: bool = False) -> Taps:
        """See `Detector.features`."""
        if freeze_backbone:
            with torch.no_grad(), evaluating(self.backbone):
                stages = self.backbone(images)
        else:
            stages = self.backbone(images)
        return Taps(c5=stages[-1], pyramid=self.fpn(stages))

    def predict(self, pyramid: tuple[Tensor, ...], geometry: Geometry) -> Outputs:
        """See `Detector.predict`. `box_deltas` are distances in strides, after the ReLU, as torchvision's."""
        return Outputs(*self.head(pyramid))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`positives`: locations that answer for a box."""
        return {"positives": self._targets(batch).positive.sum().float()}

    def task_losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Focal, GIoU and centerness loss, each the sum over locations / positives of the global batch.

        Locations in ignored regions that answer for no box are left out of the focal loss.
        """
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        logits, distances, centerness = _flat(outputs, targets.points)
        positive = targets.positive
        counted = positive | (targets.on_image & ~targets.points.inside_any(batch.ignore))
        focal = sigmoid_focal_loss(logits, self._one_hot(targets), alpha=0.25, gamma=2.0, reduction="none")
        xy, stride, boxes = targets.of_positives()
        giou = generalized_box_iou_loss(pts.decode(xy, stride, distances[positive]), boxes, reduction="sum")
        wanted = pts.centerness(pts.encode(xy, stride, boxes))
        inside = F.binary_cross_entropy_with_logits(centerness[positive], wanted, reduction="sum")
        return {"cls": (focal.sum(-1) * counted).sum() * share, "box": giou * share, "centerness": inside * share}

    def distill_losses(self, student: Outputs, target: Outputs, batch: Batch, box_loss: str) -> dict[str, Tensor]:
        """See `Detector.distill_losses`. Both terms are sums / positives of the global batch.

        `cls` covers every location of the image (ignored regions too: the target knows what is there), not the padding;
        the target's own entropy is taken off, which moves no gradient and makes the term 0 where both agree.
        Box errors are in strides, summed over the four sides. `bounded` is Chen et al.'s L_b with margin 0: the
        student's squared error to the ground truth, where it exceeds the target's. `smooth_l1` (beta 1) draws the
        student to the target.
        """
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        logits, distances, _ = _flat(student, targets.points)
        soft, wanted, _ = (x.detach() for x in _flat(target, targets.points))
        cls = F.binary_cross_entropy_with_logits(logits, soft.sigmoid(), reduction="none")
        cls = cls - F.binary_cross_entropy_with_logits(soft, soft.sigmoid(), reduction="none")
        box = self._distill_boxes(distances[targets.positive], wanted[targets.positive], targets, box_loss)
        return {"cls": (cls.sum(-1) * targets.on_image).sum() * share, "box": box * share}

    @torch.no_grad()
    def detect(self, outputs: Outputs, geometry: Geometry) -> list[Detections]:
        """See `Detector.detect`. Boxes without area are dropped."""
        points = self._points(geometry)
        logits, distances, centerness = _flat(outputs, points)
        scores = (logits.sigmoid() * centerness.sigmoid()[..., None]).sqrt()
        scores = scores * points.inside_images(geometry.sizes)[..., None]
        boxes = pts.decode(points.xy, points.stride, distances)
        sizes = geometry.sizes.tolist()
        return [
            self._detect_one(s, b, points, (size[0], size[1])) for s, b, size in zip(scores, boxes, sizes, strict=True)
        ]

    def _detect_one(self, scores: Tensor, boxes: Tensor, points: pts.Points, size: tuple[int, int]) -> Detections:
        """(L, K) scores and (L, 4) boxes of one image of (height, width) -> its detections."""
        kept, num_classes, start = [], scores.shape[1], 0
        for rows, columns in points.shapes:
            level = scores[start : start + rows * columns].flatten()
            best, index = level.topk(min(self.config.candidates, len(level)))
            kept.append(index[best > self.config.score_threshold] + start * num_classes)
            start += rows * columns
        index = torch.cat(kept)
        boxes = clip_boxes_to_image(boxes[index // num_classes], size)
        some = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, index = boxes[some], index[some]
        scores, labels = scores.flatten()[index], index % num_classes
        keep = batched_nms(boxes, scores, labels, self.config.nms)[: self.config.detections]
        return Detections(boxes[keep], scores[keep], labels[keep])

    def _points(self, geometry: Geometry) -> pts.Points:
        return pts.grid(geometry.canvas, self.shapes.strides, self.config.point_offset, geometry.sizes.device)

    def _targets(self, batch: Batch) -> Targets:
        points, sizes = self._points(batch.geometry), batch.geometry.sizes
        boxes, labels = torch.cat(batch.boxes), torch.cat(batch.labels)
        counts = torch.tensor([len(b) for b in batch.boxes], device=sizes.device)
        image = torch.repeat_interleave(counts, output_size=len(boxes))
        matched = assign(boxes, image, sizes, points, self.config.center_radius, self.config.nearest)
        return Targets(points, matched, boxes, labels, points.inside_images(sizes))

    def _one_hot(self, targets: Targets) -> Tensor:
        """(B, L, K) float32: 1 at the label of each positive."""
        background = self.shapes.num_classes
        labels = torch.cat([targets.labels, targets.labels.new_full((1,), background)])  # -1 reads the last
        hot = torch.zeros(*targets.matched.shape, background + 1, device=labels.device)
        return hot.scatter_(2, labels[targets.matched][..., None], 1.0)[..., :background]

    def _distill_boxes(self, student: Tensor, target: Tensor, targets: Targets, box_loss: str) -> Tensor:
        """(P, 4) distances of student and target -> the sum of the box term."""
        if box_loss == "smooth_l1":
            return F.smooth_l1_loss(student, target, reduction="sum")
        if box_loss != "bounded":
            raise ValueError(f"box_loss must be 'bounded' or 'smooth_l1', got {box_loss!r}")
        truth = pts.encode(*targets.of_positives()).clamp(min=0)  # the head cannot say less than 0
        error = (student - truth).square().sum(-1)
        return (error * (error.detach() > (target - truth).square().sum(-1))).sum()


def build(config: Config, num_classes: int, weights_follow: bool = False) -> FCOS:
    """A new detector with the random state of the caller. With `weights_follow` the caller loads a whole state dict
    next, so `backbone.weights` is neither read nor asked for."""
    backbone = plugin("kd.backbones", config.backbone.name).build(config.backbone, weights_follow)
    return FCOS(config, num_classes, backbone)


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `torchvision.models.detection.fcos_*_fpn` under our names: levels 3-7, width 256, depth 4."""
    ours = {k.replace("backbone.body.", "backbone.").replace("backbone.fpn.", "fpn."): v for k, v in state.items()}
    return {k: v for k, v in ours.items() if not k.endswith("num_batches_tracked")}


def _flat(outputs: Outputs, points: pts.Points) -> tuple[Tensor, Tensor, Tensor]:
    """Maps -> float32 class logits (B, L, K), distances (B, L, 4), centerness logits (B, L)."""
    found = tuple((m.shape[-2], m.shape[-1]) for m in outputs.class_logits)
    if found != points.shapes:
        raise ValueError(
            f"the head's maps are {found} cells, the canvas asks for {points.shapes}; was the pyramid aligned?"
        )
    return _join(outputs.class_logits), _join(outputs.box_deltas), _join(outputs.centerness).squeeze(-1)


def _join(maps: tuple[Tensor, ...]) -> Tensor:
    """(B, C, H, W) maps -> (B, L, C) float32."""
    return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2).float()
