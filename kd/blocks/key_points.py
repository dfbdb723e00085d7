"""Where to look hardest: few cells, near objects, about which two heads disagree.

Shape letters: B images, H x W cells of a level, L cells of all levels of one image.
"""

import torch
from torch import Tensor

from data_sharding.batch import Batch
from kd.blocks.foreground import all_boxes, cover_objects


def object_bumps(batch: Batch, like: Tensor, stride: int) -> Tensor:
    """(B, H, W) of a level `like` (B, C, H, W): a Gaussian around each box's centre, 1 there and e^-2 at the middle of
    a side, on the cells that meet the box; where boxes overlap, the greatest."""
    boxes, level = all_boxes(batch)[0], cover_objects(batch, like, stride)
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    # A cell that a box lies in, or ends in, has its own centre up to half a stride farther.
    sigma = (sides / 4).clamp(min=stride / 2)
    gap = (level.centres(stride) - centre[level.box]) / sigma[level.box]
    found = boxes.new_zeros(level.shape)
    found.view(-1).scatter_reduce_(0, level.cell, (-gap.square().sum(dim=1) / 2).exp(), "amax")
    return found


def best_scores(class_logits: tuple[Tensor, ...]) -> list[Tensor]:
    """(B, A * K, H, W) per level -> (B, H, W): the greatest probability of any class of any answer of a cell."""
    return [x.float().amax(dim=1).sigmoid() for x in class_logits]


def strongest(weights: Tensor, most: int) -> Tensor:
    """(B, L) weights >= 0 -> the same with all but each image's `most` greatest set to 0, and these brought to a sum
    of 1 (or left at 0)."""
    kept = torch.zeros_like(weights)
    best = weights.topk(min(most, weights.shape[1]), dim=1)
    kept.scatter_(1, best.indices, best.values)
    total = kept.sum(dim=1, keepdim=True)
    return kept / torch.where(total > 0, total, 1)
