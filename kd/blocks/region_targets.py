"""What the labels ask of a two-stage detector: of its anchors, and of the regions that it proposes.

Shape letters: B images, L anchors, N regions of all images, P positives, M boxes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from data_sharding.batch import Batch
from kd.blocks.anchors import Anchors, under_any
from kd.blocks.draw import draw
from kd.blocks.match import BACKGROUND, match_all

HALF = 0.5
"""A region is an object's from this IoU on, and an ignored region's."""


@dataclass(frozen=True)
class AnchorTargets:
    """What the first stage is asked."""

    anchors: Anchors
    drawn: Tensor
    """(B, L) bool: the anchors that it learns from."""
    matched: Tensor
    """(B, L) int64 index into the boxes of all images, or below 0."""
    boxes: Tensor
    """(M, 4) float32, all images' boxes one after the other."""

    @property
    def positive(self) -> Tensor:
        """(B, L) bool: drawn, and answering for a box."""
        return self.drawn & (self.matched >= 0)

    def of_positives(self) -> tuple[Tensor, Tensor]:
        """(P, 4) anchors and (P, 4) boxes of the positives, in the order of `x[positive]`."""
        return self.anchors.boxes[self.positive.nonzero()[:, 1]], self.boxes[self.matched[self.positive]]


@dataclass(frozen=True)
class RegionTargets:
    """What the second stage is asked."""

    boxes: Tensor
    """(N, 4): the regions."""
    labels: Tensor
    """(N,) int64: class + 1, or 0 for the background."""
    counted: Tensor
    """(N,) bool: the class loss covers it."""
    truth: Tensor
    """(P, 4): the boxes of the positives."""
    which: Tensor
    """(N,) int64: the region's box among those of all images, or -1."""

    @property
    def positive(self) -> Tensor:
        """(N,) bool."""
        return self.labels > 0


def anchor_targets(anchors: Anchors, batch: Batch, samples: int) -> AnchorTargets:
    """Anchors from an IoU of 0.7 on, and each box's best, are positive, below 0.3 negative; of both `samples` per image
    are drawn, at most half of them positive, by (`batch.key`, image)."""
    on_image = anchors.inside_images(batch.geometry.sizes)
    matched = match_all(batch.boxes, anchors.boxes, on_image, 0.7, 0.3)
    drawn = []
    for mine, there, ignore, image in zip(matched, on_image, batch.ignore, batch.image_ids, strict=True):
        negative = (mine == BACKGROUND) & there & ~under_any(anchors.boxes, ignore, HALF)
        drawn.append(draw(mine >= 0, negative, samples, 0.5, (*batch.key, "anchors", image)))
    return AnchorTargets(anchors, torch.stack(drawn), matched, torch.cat(batch.boxes))


@torch.no_grad()
def drawn_regions(proposals: tuple[Tensor, ...], batch: Batch, samples: int, share: float) -> tuple[Tensor, ...]:
    """Per image, up to `samples` of its proposals and its labelled boxes, up to a `share` of them on objects, none of
    the others in an ignored region; drawn by (`batch.key`, image)."""
    found = []
    for mine, boxes, ignore, image in zip(proposals, batch.boxes, batch.ignore, batch.image_ids, strict=True):
        regions = torch.cat([mine, boxes])
        positive = _best(regions, boxes)[0] >= HALF
        negative = ~positive & ~under_any(regions, ignore, HALF)
        found.append(regions[draw(positive, negative, samples, share, (*batch.key, "regions", image))])
    return tuple(found)


@torch.no_grad()
def region_targets(regions: tuple[Tensor, ...], batch: Batch) -> RegionTargets:
    """Each region is of the box that it overlaps most, from an IoU of 0.5 on, else background."""
    labels, counted, truth, found, start = [], [], [], [], 0
    for mine, boxes, classes, ignore in zip(regions, batch.boxes, batch.labels, batch.ignore, strict=True):
        overlap, which = _best(mine, boxes)
        positive = overlap >= HALF
        known = torch.cat([classes + 1, classes.new_zeros(1)])  # a place to point at where there is no box
        labels.append(torch.where(positive, known[which], 0))
        counted.append(positive | ~under_any(mine, ignore, HALF))
        truth.append(boxes[which[positive]])
        found.append(torch.where(positive, which + start, -1))
        start += len(boxes)
    return RegionTargets(*(torch.cat(x) for x in (regions, labels, counted, truth, found)))


def _best(regions: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 4) regions, (m, 4) boxes -> (n,) greatest IoU and (n,) whose; 0 and 0 where there is no box."""
    overlap = torch.cat([box_iou(regions, boxes), regions.new_zeros(len(regions), 1)], dim=1)
    return overlap.max(dim=1)
