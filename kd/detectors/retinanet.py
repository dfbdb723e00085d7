"""RetinaNet (Lin et al., ICCV 2017, arXiv:1708.02002) for small objects.

Anchors, matcher, box coder, head and losses are torchvision's, under torchvision's parameter names. Our own: any run of
levels P2..P7, anchor sizes in strides, so that P2 holds small ones, and regions in which nothing counts. Anchors whose
centre lies on the padding take part neither in losses nor in detection. Losses divide by the positives of the global
batch, not image by image, so that ranks and micro-batches add up.

Shape letters: B images, K classes, L anchors of all levels, P positive anchors of the micro-batch, M boxes.
"""

import re
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
from kd.blocks.anchor_coding import AnchorCoding
from kd.blocks.anchor_towers import AnchorTowers, HeadNorm
from kd.blocks.anchors import Anchors, AnchorShapes, check_anchors, under_any
from kd.blocks.answers import Answers, of_all_images
from kd.blocks.dense import best_of_levels, flat, keep_rows, one_hot, suppressed
from kd.blocks.distribution import check_bins
from kd.blocks.fpn import Top
from kd.blocks.match import BACKGROUND, match_all
from kd.blocks.response import box_error, soft_classes
from kd.detectors._torchvision import our_names
from kd.detectors.base import Detections, DetectorConfig, PyramidDetector, build_backbone

# Older files count the ReLUs between a tower's convolutions too.
_OLD_TOWER = re.compile(r"^(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class Config(DetectorConfig):
    """Settings of a RetinaNet; the defaults are those of torchvision's second version (`retinanet_resnet50_fpn_v2`)."""

    name: Literal["retinanet"] = "retinanet"
    detections: int = 300
    top: Top = "c5"
    """What P6 is made from: C5 as in the paper, or P5 as in torchvision's first version."""
    head_norm: HeadNorm = "group"
    """GroupNorm in the head; the paper and torchvision's first version have none."""
    box_loss: Literal["l1", "giou"] = "giou"
    """On box codes (torchvision's first version), or on boxes."""
    anchor_sizes: tuple[float, ...] = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
    """Square roots of the anchors' areas, in strides: 4 on P3 is 32 pixels, on P2 it is 16."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width."""
    whole_pixels: bool = True
    """Round anchors to whole pixels as torchvision does. False keeps small ones (P2, below 4 strides) exact."""
    positive_iou: float = 0.5
    """Anchors that overlap a box at least so much answer for it; each box also has its best anchor."""
    negative_iou: float = 0.4
    """Anchors that overlap no box so much are background; those between count for nothing."""
    bins: int | None = None
    """Every side of a box is a distribution over distances of 0..bins strides from the anchor's centre (GFL's is 16),
    learnt with a distribution focal loss too; null: deltas. The method `ld` needs it, equal on both sides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bins(self.bins)
        if not 0 < self.negative_iou <= self.positive_iou <= 1:
            raise ValueError(
                "anchors need 0 < negative_iou <= positive_iou <= 1, got "
                f"negative_iou {self.negative_iou} and positive_iou {self.positive_iou}"
            )
        check_anchors(self.anchor_sizes, self.anchor_ratios)


@dataclass(frozen=True)
class Targets:
    """What the labels of a micro-batch ask of every anchor."""

    anchors: Anchors
    matched: Tensor
    """(B, L) int64 index into the boxes of all images, or below 0: background, or neither."""
    on_image: Tensor
    """(B, L) bool: not on the padding."""
    ignored: Tensor
    """(B, L) bool: in a region in which nothing counts."""
    labels: Tensor
    """(M,) int64."""
    boxes: Tensor
    """(M, 4) float32, all images' boxes one after the other."""

    @property
    def positive(self) -> Tensor:
        """(B, L) bool."""
        return self.matched >= 0

    @property
    def counted(self) -> Tensor:
        """(B, L) bool: the class loss covers it."""
        return self.positive | ((self.matched == BACKGROUND) & self.on_image & ~self.ignored)

    def of_positives(self) -> tuple[Tensor, Tensor]:
        """(P,) which anchors and (P, 4) boxes of the positives, in the order of `x[positive]`."""
        return self.positive.nonzero()[:, 1], self.boxes[self.matched[self.positive]]


class RetinaNet(PyramidDetector):
    """Backbone, pyramid, head."""

    def __init__(self, config: Config, num_classes: int, backbone: Backbone) -> None:
        anchors = AnchorShapes(sizes=config.anchor_sizes, ratios=config.anchor_ratios, whole_pixels=config.whole_pixels)
        super().__init__(config, num_classes, backbone, config.top, (anchors,), bins=config.bins)
        self.config, self.anchors = config, anchors
        self.coding = AnchorCoding(distances=config.bins is not None)
        last = anchors.per_cell, num_classes, config.head_norm, config.bins
        self.head = AnchorTowers(config.width, config.head_depth, *last)

    def predict(
        self,
        pyramid: tuple[Tensor, ...],
        geometry: Geometry,
        proposals: tuple[Tensor, ...] | None = None,
        sampling: Batch | None = None,
    ) -> Outputs:
        """See `Detector.predict`. `box_deltas` are torchvision's box codes of every anchor."""
        return Outputs(*self.head(pyramid))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`positives`: anchors that answer for a box."""
        return {"positives": self._targets(batch).positive.sum().float()}

    def task_losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Focal, box and, with `bins`, distribution focal loss, each the sum over anchors / positives of the global
        batch.

        Background anchors in ignored regions are left out of the focal loss.
        """
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        logits, codes = self._flat(outputs, targets.anchors)
        hot = one_hot(targets.matched, targets.labels, self.shapes.num_classes)
        focal = sigmoid_focal_loss(logits, hot, alpha=0.25, gamma=2.0, reduction="none")
        box = self._box_loss(codes[targets.positive], targets)
        losses = {"cls": (focal.sum(-1) * targets.counted).sum() * share, "box": box * share}
        edges = self._edges(outputs, targets.anchors)
        if edges is None:
            return losses
        spread = distribution.focal(edges[targets.positive], self._truth(targets)).mean(-1).sum()
        return losses | {"dfl": distribution.DFL * spread * share}

    def distill_losses(self, student: Outputs, target: Outputs, batch: Batch, box_loss: str) -> dict[str, Tensor]:
        """See `Detector.distill_losses`. Both terms are sums / positives of the global batch.

        `cls` covers every anchor of the image (ignored regions too: the target knows what is there), not the padding.
        Box errors are in box codes, summed over the four.
        """
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        logits, codes = self._flat(student, targets.anchors)
        soft, wanted = (x.detach() for x in self._flat(target, targets.anchors))
        box = box_error(codes[targets.positive], wanted[targets.positive], self._truth(targets), box_loss)
        cls = soft_classes(logits, soft).sum(-1) * targets.on_image
        return {"cls": cls.sum() * share, "box": box * share}

    def answers(self, outputs: Outputs, batch: Batch) -> Answers:
        """See `Detector.answers`."""
        targets, share = self._targets(batch), 1 / batch.totals["positives"].clamp(min=1)
        anchors, edges = targets.anchors, self._edges(outputs, targets.anchors)
        matched = targets.matched, targets.on_image, targets.labels, share
        common = of_all_images(self._flat(outputs, anchors), anchors.boxes, *matched)
        index = torch.arange(len(anchors.boxes), device=anchors.boxes.device).repeat(len(batch))
        decode = partial(self.coding.decode, anchors=anchors, index=index)
        flat_edges = None if edges is None else edges.flatten(0, 1)
        return Answers(**common, regions=False, decode=decode, lengths=tuple(anchors.lengths), edges=flat_edges)

    @torch.no_grad()
    def detect(self, outputs: Outputs, geometry: Geometry) -> list[Detections]:
        """See `Detector.detect`. Boxes without area are dropped."""
        anchors, classes = self._anchors(geometry), self.shapes.num_classes
        logits, codes = self._flat(outputs, anchors)
        scores = logits.sigmoid() * anchors.inside_images(geometry.sizes)[..., None]
        found = []
        for s, c, (height, width) in zip(scores, codes, geometry.sizes.tolist(), strict=True):
            index = best_of_levels(s, anchors.lengths, self.config.candidates, self.config.score_threshold)
            boxes = self.coding.decode(c[index // classes], anchors, index // classes)
            best = boxes, s.flatten()[index], index % classes
            found.append(Detections(*suppressed(*best, (height, width), self.config.nms, self.config.detections)))
        return found

    def _keep_classes(self, classes: Sequence[int]) -> None:
        per_cell, known = self.anchors.per_cell, self.shapes.num_classes
        rows = [anchor * known + c for anchor in range(per_cell) for c in classes]
        keep_rows(self.head.classification_head.cls_logits, rows)

    def _box_loss(self, codes: Tensor, targets: Targets) -> Tensor:
        """(P, 4) codes of the positives -> the sum of the box loss."""
        if self.config.box_loss == "l1":
            return F.l1_loss(codes, self._truth(targets), reduction="sum")
        index, boxes = targets.of_positives()
        return generalized_box_iou_loss(self.coding.decode(codes, targets.anchors, index), boxes, reduction="sum")

    def _truth(self, targets: Targets) -> Tensor:
        """(P, 4): the codes of the boxes that the positives answer for."""
        index, boxes = targets.of_positives()
        return self.coding.encode(boxes, targets.anchors, index)

    def _anchors(self, geometry: Geometry) -> Anchors:
        return self.anchors.on(geometry.canvas, self.shapes.strides, geometry.sizes.device)

    def _targets(self, batch: Batch) -> Targets:
        anchors = self._anchors(batch.geometry)
        on_image = anchors.inside_images(batch.geometry.sizes)
        high, low = self.config.positive_iou, self.config.negative_iou
        return Targets(
            anchors,
            matched=match_all(batch.boxes, anchors.boxes, on_image, high, low),
            on_image=on_image,
            ignored=torch.stack([under_any(anchors.boxes, regions, low) for regions in batch.ignore]),
            labels=torch.cat(batch.labels),
            boxes=torch.cat(batch.boxes),
        )

    def _flat(self, outputs: Outputs, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Maps -> float32 class logits (B, L, K), box codes (B, L, 4)."""
        logits = flat(outputs.class_logits, anchors.shapes, self.shapes.num_classes)
        return logits, distribution.sides(_boxes(outputs, anchors))[0]

    def _edges(self, outputs: Outputs, anchors: Anchors) -> Tensor | None:
        """(B, L, 4, E) logits of the distributions, where there are any."""
        return distribution.sides(_boxes(outputs, anchors))[1]


def _boxes(outputs: Outputs, anchors: Anchors) -> Tensor:
    return flat(outputs.box_deltas, anchors.shapes, outputs.box_deltas[0].shape[1] // anchors.per_cell)


def build(config: Config, num_classes: int, weights_follow: bool = False) -> RetinaNet:
    """A new detector with the random state of the caller. With `weights_follow` the caller loads a whole state dict
    next, so `backbone.weights` is neither read nor asked for."""
    return RetinaNet(config, num_classes, build_backbone(config.backbone, weights_follow))


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `torchvision.models.detection.retinanet_*` under our names, also one of its older files."""
    return {_OLD_TOWER.sub(_as_block, name): value for name, value in our_names(state).items()}


def _as_block(old: re.Match[str]) -> str:
    return f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}"
