"""Which anchor answers for which box: torchvision's Matcher by overlap, image by image, padding left out.

Shape letters: B images, L anchors, M boxes of all images, N boxes of one image.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

BACKGROUND, BETWEEN = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS
"""What stands in place of a box: nothing here, and neither an object nor background."""


def match_all(boxes: Sequence[Tensor], anchors: Tensor, allowed: Tensor, high: float, low: float) -> Tensor:
    """(B, L) int64: the index, into the boxes of all images one after the other, that each anchor answers for,
    or BACKGROUND or BETWEEN.

    `boxes` are (N, 4) per image, `anchors` (L, 4), `allowed` (B, L) bool. An anchor answers for the box that it
    overlaps most, from an IoU of `high` on; every box gets at least its best allowed anchor (ties: all of them)
    unless another box overlaps that anchor more. An anchor that is not allowed is BACKGROUND.
    """
    starts = [0, *accumulate(len(b) for b in boxes)]
    matcher = Matcher(high, low, allow_low_quality_matches=True)
    rows = [_match(b, anchors, ok, matcher, start) for b, ok, start in zip(boxes, allowed, starts, strict=False)]
    return torch.stack(rows)


def _match(boxes: Tensor, anchors: Tensor, allowed: Tensor, matcher: Matcher, start: int) -> Tensor:
    if not len(boxes):
        return torch.full_like(allowed, BACKGROUND, dtype=torch.int64)
    overlap = box_iou(boxes, anchors) * allowed
    lost = (overlap.amax(dim=1) <= 0).nonzero()[:, 0]
    if len(lost):
        # The matcher takes every anchor as best for a box that none overlaps: such a box gets the nearest one instead.
        centres = boxes[lost, None, :2] + boxes[lost, None, 2:]
        apart = (centres - anchors[:, :2] - anchors[:, 2:]).square().sum(-1)
        overlap[lost, apart.masked_fill(~allowed, torch.inf).argmin(dim=1)] = 1e-6
    found = matcher(overlap)
    return torch.where(found >= 0, found + start, found)
