"""Faster R-CNN (Ren et al., NeurIPS 2015, arXiv:1506.01497) with a feature pyramid, for small objects.

Anchors, matchers, box coders, heads and RoIAlign are torchvision's, under torchvision's parameter names. Our own: any
run of levels P2..P7, anchor sizes in strides, ignored regions, and draws keyed by run, epoch and image. What lies on
the padding takes part neither in losses nor in proposals.

Departure, so that what losses divide by follows from labels alone: the second stage's losses divide by the number of
regions that a global batch asks for (`roi_samples` per image), also where an image has fewer to give.

Shape letters: B images, K classes, L anchors of all levels, M boxes, N regions of all images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from data_sharding.batch import Batch, Geometry, Outputs
from kd.backbones.base import Backbone
from kd.blocks.anchors import Anchors, AnchorShapes, check_anchors
from kd.blocks.answers import Answers
from kd.blocks.dense import best_of_levels, flat, suppressed
from kd.blocks.region_answers import region_answers
from kd.blocks.region_targets import AnchorTargets, RegionTargets, anchor_targets, drawn_regions, region_targets
from kd.blocks.response import box_error, soft_classes, soft_regions
from kd.blocks.rois import Proposer, RegionHead, pool
from kd.detectors._torchvision import folded, our_names
from kd.detectors.base import Detections, DetectorConfig, PyramidDetector, build_backbone


@dataclass(frozen=True, kw_only=True)
class Config(DetectorConfig):
    """Settings of a Faster R-CNN; the defaults are torchvision's (`fasterrcnn_resnet50_fpn`)."""

    name: Literal["faster_rcnn"] = "faster_rcnn"
    head_depth: int = 1
    """3 x 3 convolutions of the region proposal network."""
    levels: tuple[int, ...] = (2, 3, 4, 5, 6)
    """Of the proposals; regions are pooled from those up to 5."""
    anchor_sizes: tuple[float, ...] = (8.0,)
    """Square roots of the anchors' areas, in strides: 8 on P2 is 32 pixels. Smaller ones for smaller objects."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width."""
    whole_pixels: bool = True
    """Round anchors to whole pixels as torchvision does. False keeps small ones exact."""
    anchor_samples: int = 256
    """Anchors per image that the first stage learns from, up to half of them positive."""
    proposals: int = 1000
    """Most regions per image that the second stage looks at, or draws from in training."""
    proposal_nms: float = 0.7
    """Proposals that overlap a better one more (IoU) are suppressed."""
    roi_samples: int = 512
    """Regions per image that the second stage learns from."""
    roi_positives: float = 0.25
    """Greatest share of them that overlap an object by half."""
    roi_width: int = 1024
    """Channels of the second stage's hidden layers."""
    roi_convs: int = 0
    """Convolutions before one hidden layer (torchvision's second version: 4); 0: two hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("anchor_samples", "proposals", "roi_samples", "roi_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("proposal_nms", "roi_positives"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        check_anchors(self.anchor_sizes, self.anchor_ratios)


class FasterRCNN(PyramidDetector):
    """Backbone, pyramid, proposals, second stage."""

    def __init__(self, config: Config, num_classes: int, backbone: Backbone) -> None:
        anchors = AnchorShapes(sizes=config.anchor_sizes, ratios=config.anchor_ratios, whole_pixels=config.whole_pixels)
        super().__init__(config, num_classes, backbone, "pool", places=(anchors,), family="two_stage")
        self.config, self.anchors = config, anchors
        self.rpn = Proposer(config.width, config.head_depth, self.anchors.per_cell)
        self.roi_heads = RegionHead(config.width, config.roi_convs, config.roi_width, num_classes)
        self.anchor_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.region_coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))

    def predict(
        self,
        pyramid: tuple[Tensor, ...],
        geometry: Geometry,
        proposals: tuple[Tensor, ...] | None = None,
        sampling: Batch | None = None,
    ) -> Outputs:
        """See `Detector.predict`. No gradient passes through the proposals' places."""
        objectness, codes = self.rpn(pyramid)
        if proposals is None:
            proposals = self._propose(objectness, codes, geometry)
            if sampling is not None:
                proposals = drawn_regions(proposals, sampling, self.config.roi_samples, self.config.roi_positives)
        regions = pool(pyramid, proposals, self.shapes.strides, geometry.canvas)
        logits, deltas = self.roi_heads(regions)
        return Outputs(objectness, codes, (), proposals, logits, deltas)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`anchors`: those that the first stage learns from; `positives`: those of them that answer for a box."""
        targets = self._anchor_targets(batch)
        return {"anchors": targets.drawn.sum().float(), "positives": targets.positive.sum().float()}

    def task_losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and smooth L1 (beta 1/9) of both stages: the first's (`rpn_cls`, `rpn_box`) are sums / anchors
        drawn, the second's (`cls`, `box`) sums / regions asked for.

        Anchors and regions on the background that lie in ignored regions are left out.
        """
        per_anchor, per_region = self._shares(batch)
        anchors, regions = self._anchor_targets(batch), region_targets(outputs.proposals, batch)
        objectness, codes = self._flat(outputs, anchors.anchors)
        found = F.binary_cross_entropy_with_logits(objectness, anchors.positive.float(), reduction="none")
        wanted = self.anchor_coder.encode_single(anchors.of_positives()[1], anchors.of_positives()[0])
        place = F.smooth_l1_loss(codes[anchors.positive], wanted, beta=1 / 9, reduction="sum")
        logits, deltas = self._of_regions(outputs, regions)
        named = F.cross_entropy(logits, regions.labels, reduction="none") * regions.counted
        box = F.smooth_l1_loss(deltas, self._region_codes(regions), beta=1 / 9, reduction="sum")
        return {
            "cls": named.sum() * per_region,
            "box": box * per_region,
            "rpn_cls": (found * anchors.drawn).sum() * per_anchor,
            "rpn_box": place * per_anchor,
        }

    def distill_losses(self, student: Outputs, target: Outputs, batch: Batch, box_loss: str) -> dict[str, Tensor]:
        """See `Detector.distill_losses`: both stages, on the anchors drawn and on the student's own regions (S19).

        `cls`: the first stage's soft binary cross-entropy / anchors drawn, and the second's soft cross-entropy, in
        which the background weighs more, / regions asked for. `box`: errors in box codes, of positives, alike.
        `target` must have been asked about the student's proposals.
        """
        if [len(p) for p in student.proposals] != [len(p) for p in target.proposals]:
            raise ValueError("the target was asked about other proposals; give predict the student's")
        per_anchor, per_region = self._shares(batch)
        anchors, regions = self._anchor_targets(batch), region_targets(student.proposals, batch)
        objectness, codes = self._flat(student, anchors.anchors)
        soft, wanted = (x.detach() for x in self._flat(target, anchors.anchors))
        truth = self.anchor_coder.encode_single(anchors.of_positives()[1], anchors.of_positives()[0])
        place = box_error(codes[anchors.positive], wanted[anchors.positive], truth, box_loss)
        found = soft_classes(objectness, soft) * anchors.drawn
        logits, deltas = self._of_regions(student, regions)
        soft_logits, soft_deltas = self._of_regions(target, regions)
        box = box_error(deltas, soft_deltas, self._region_codes(regions), box_loss)
        named = soft_regions(logits, soft_logits)
        return {
            "cls": found.sum() * per_anchor + named.sum() * per_region,
            "box": place * per_anchor + box * per_region,
        }

    def answers(self, outputs: Outputs, batch: Batch) -> Answers:
        """See `Detector.answers`."""
        return region_answers(outputs, batch, self._shares(batch)[1], self.region_coder)

    @torch.no_grad()
    def detect(self, outputs: Outputs, geometry: Geometry) -> list[Detections]:
        """See `Detector.detect`. Boxes without area are dropped."""
        assert outputs.roi_logits is not None
        assert outputs.roi_deltas is not None
        classes, counts = self.shapes.num_classes, [len(p) for p in outputs.proposals]
        scores = outputs.roi_logits.float().softmax(-1)[:, 1:]
        boxes = self.region_coder.decode_single(outputs.roi_deltas.float(), torch.cat(outputs.proposals))
        boxes = boxes.unflatten(1, (classes + 1, 4))[:, 1:]
        found = []
        sizes = geometry.sizes.tolist()
        # One image has no split to fix into an exported graph, where the number of proposals is any.
        by_image = ((scores,), (boxes,)) if len(counts) == 1 else (scores.split(counts), boxes.split(counts))
        for s, b, (height, width) in zip(*by_image, sizes, strict=True):
            index = (s.flatten() > self.config.score_threshold).nonzero()[:, 0]
            best = b.flatten(0, 1)[index], s.flatten()[index], index % classes
            found.append(Detections(*suppressed(*best, (height, width), self.config.nms, self.config.detections)))
        return found

    def _keep_classes(self, classes: Sequence[int]) -> None:
        self.roi_heads.keep_classes(classes)

    @torch.no_grad()
    def _propose(
        self, objectness: tuple[Tensor, ...], codes: tuple[Tensor, ...], geometry: Geometry
    ) -> tuple[Tensor, ...]:
        """The best regions of each image, (n, 4), best first."""
        anchors = self._anchors(geometry)
        levels = torch.repeat_interleave(
            torch.arange(len(anchors.lengths), device=geometry.sizes.device),
            torch.tensor(anchors.lengths, device=geometry.sizes.device),
        )
        scores = flat(objectness, anchors.shapes, 1).masked_fill(
            ~anchors.inside_images(geometry.sizes)[..., None], -math.inf
        )
        proposals = []
        for s, c, size in zip(scores, flat(codes, anchors.shapes, 4), geometry.sizes.tolist(), strict=True):
            index = best_of_levels(s, anchors.lengths, self.config.candidates, -math.inf)
            boxes = clip_boxes_to_image(self.anchor_coder.decode_single(c[index], anchors.boxes[index]), size)
            some = remove_small_boxes(boxes, 1e-3)
            boxes, index = boxes[some], index[some]
            keep = batched_nms(boxes, s[index, 0], levels[index], self.config.proposal_nms)[: self.config.proposals]
            proposals.append(boxes[keep])
        return tuple(proposals)

    def _anchors(self, geometry: Geometry) -> Anchors:
        return self.anchors.on(geometry.canvas, self.shapes.strides, geometry.sizes.device)

    def _anchor_targets(self, batch: Batch) -> AnchorTargets:
        return anchor_targets(self._anchors(batch.geometry), batch, self.config.anchor_samples)

    def _region_codes(self, regions: RegionTargets) -> Tensor:
        """(P, 4): what the positives' boxes are in the second stage's coding."""
        return self.region_coder.encode_single(regions.truth, regions.boxes[regions.positive])

    def _shares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What a sum over anchors, and one over regions, is multiplied by."""
        asked = batch.totals["images"] * self.config.roi_samples
        return 1 / batch.totals["anchors"].clamp(min=1), 1 / asked.clamp(min=1)

    def _flat(self, outputs: Outputs, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Maps -> float32 objectness logits (B, L), box codes (B, L, 4)."""
        objectness = flat(outputs.class_logits, anchors.shapes, 1).squeeze(-1)
        return objectness, flat(outputs.box_deltas, anchors.shapes, 4)

    def _of_regions(self, outputs: Outputs, regions: RegionTargets) -> tuple[Tensor, Tensor]:
        """Class logits (N, K + 1) and, of the positives, the codes (P, 4) of their box's class; float32."""
        assert outputs.roi_logits is not None
        assert outputs.roi_deltas is not None
        deltas = outputs.roi_deltas.float().unflatten(1, (-1, 4))
        return outputs.roi_logits.float(), deltas[regions.positive, regions.labels[regions.positive]]


def build(config: Config, num_classes: int, weights_follow: bool = False) -> FasterRCNN:
    """A new detector with the random state of the caller. With `weights_follow` the caller loads a whole state dict
    next, so `backbone.weights` is neither read nor asked for."""
    return FasterRCNN(config, num_classes, build_backbone(config.backbone, weights_follow))


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `torchvision.models.detection.fasterrcnn_resnet50_fpn` (first version, also an older file, or
    second) under our names. The second's BatchNorms outside the backbone are folded into the convolutions before."""
    return folded(our_names(state), ("fpn.", "roi_heads."))
