"""Which location answers for which box: FCOS's centre sampling (arXiv:2006.09214), for small objects.

Shape letters: B images, L locations of all levels, M boxes of all images, J candidate locations of one box. Only the
few cells around each box's centre are looked at, so memory grows with M, not with M x L, and nothing is looped.
"""

import math

import torch
from torch import Tensor

from kd.blocks.points import Points


def assign(boxes: Tensor, image: Tensor, sizes: Tensor, points: Points, radius: float, nearest: bool) -> Tensor:
    """(B, L) int64: the index of the box (of M) that each location answers for, or -1.

    A location is positive for a box when it lies strictly inside it, closer than `radius` strides to its centre along
    both axes, and the farthest side of the box is within the level's range: [4, 8) strides, from 0 at the finest and to
    infinity at the coarsest level. Of several boxes the smallest wins, of equal ones the first. With `nearest`, a
    box that has no such location (smaller than a stride, or very thin) gets the location of the finest level
    nearest to its centre; it can still lose it to a smaller box.

    `boxes` (M, 4) float32 canvas pixels, `image` (M,) int64 index of each box's image, `sizes` (B, 2) int64.
    """
    limits = [_limits(sizes, points, level)[image] for level in range(len(points.strides))]
    found = [_candidates(boxes, points, level, limits[level], radius) for level in range(len(points.strides))]
    where = torch.cat([index for index, _ in found], dim=1)
    positive = torch.cat([match for _, match in found], dim=1)
    if nearest:
        lonely = ~positive.any(dim=1, keepdim=True) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
        where = torch.cat([where, _nearest(boxes, points, limits[0])], dim=1)
        positive = torch.cat([positive, lonely], dim=1)
    return _smallest(boxes, image, where, positive, len(sizes), len(points.xy))


def _limits(sizes: Tensor, points: Points, level: int) -> Tensor:
    """(B, 2) int64: how many columns and rows of a level have their location on the image."""
    cells = torch.ceil(sizes.flip(1) / points.strides[level] - points.offset).long()
    rows, columns = points.shapes[level]
    return cells.clamp(min=1).minimum(torch.tensor([columns, rows], device=sizes.device))


def _centres(boxes: Tensor, points: Points, level: int) -> Tensor:
    """(M, 2): the boxes' centres in cells of a level, where location i lies at i."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2 / points.strides[level] - points.offset


def _start(points: Points, level: int) -> int:
    return sum(rows * columns for rows, columns in points.shapes[:level])


def _candidates(boxes: Tensor, points: Points, level: int, limits: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """(M, J) location indices around the boxes' centres on one level, and (M, J) bool whether each is positive."""
    stride, last = points.strides[level], len(points.strides) - 1
    centre = _centres(boxes, points, level)[:, None]  # (M, 1, 2)
    steps = torch.arange(math.ceil(2 * radius), device=boxes.device)[None, :, None]
    cell = torch.floor(centre - radius).long() + 1 + steps  # (M, S, 2): an open interval of 2 radius holds no more
    xy = (cell + points.offset) * stride
    low, high = xy - boxes[:, None, :2], boxes[:, None, 2:] - xy
    near = ((cell - centre).abs() < radius) & (low > 0) & (high > 0) & (cell >= 0) & (cell < limits[:, None])
    far = torch.maximum(low, high)
    reach = torch.maximum(far[:, :, None, 1], far[:, None, :, 0])  # (M, S rows, S columns)
    positive = near[:, :, None, 1] & near[:, None, :, 0]
    positive &= reach >= (0 if level == 0 else 4 * stride)
    positive &= reach < (math.inf if level == last else 8 * stride)
    index = _start(points, level) + cell[:, :, None, 1] * points.shapes[level][1] + cell[:, None, :, 0]
    return index.flatten(1), positive.flatten(1)


def _nearest(boxes: Tensor, points: Points, limits: Tensor) -> Tensor:
    """(M, 1): the finest level's location nearest to each box's centre, on the image."""
    cell = torch.round(_centres(boxes, points, 0)).long().clamp(min=0).minimum(limits - 1)
    return (cell[:, 1] * points.shapes[0][1] + cell[:, 0])[:, None]


def _smallest(boxes: Tensor, image: Tensor, where: Tensor, positive: Tensor, images: int, locations: int) -> Tensor:
    """(B, L): the smallest box among those whose candidates meet in a location, or -1."""
    order = torch.argsort((boxes[:, 2:] - boxes[:, :2]).prod(dim=1), stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    # Candidates that are not positive go to one slot too many, which keeps all shapes fixed; the least rank of a
    # slot does not depend on the order in which a GPU writes.
    slot = torch.where(positive, image[:, None] * locations + where, images * locations)
    best = torch.full((images * locations + 1,), len(order), dtype=torch.int64, device=boxes.device)
    best.scatter_reduce_(0, slot.flatten(), rank[:, None].expand_as(slot).flatten(), "amin")
    winners = torch.cat([order, order.new_full((1,), -1)])
    return winners[best[:-1]].view(images, locations)
