"""Where anchors overlap objects: the imitation mask of fine-grained feature imitation (Wang et al., CVPR 2019).

Shape letters: B images, M boxes of all images, P pairs of a box and one of its cells, A anchors of a cell, H x W cells
of a level.
"""

import torch
from torch import Tensor

from data_sharding.batch import Batch
from data_sharding.codecs.foreground import foreground_cells
from kd.blocks.foreground import Covered, all_boxes, cover, enlarged


def anchor_masks(
    batch: Batch,
    shapes: list[tuple[int, int, int]],
    strides: tuple[int, ...],
    sizes: tuple[float, ...],
    ratios: tuple[float, ...],
    phi: float,
    reach: float,
) -> list[Tensor]:
    """(B, H, W) bool per level: at the cell's centre stands an anchor whose IoU with a box exceeds `phi` times the
    greatest that this box has with any anchor of any level, and the cell meets the box made `reach` times as large.

    `sizes` are square roots of the anchors' areas in strides, `ratios` height / width. The second condition matters to
    boxes much smaller than every anchor, whose IoU is the same for all anchors around them; and it keeps the mask
    within the cells that a foreground-sparse cache holds.
    """
    boxes, image = all_boxes(batch)
    large = enlarged(boxes, reach)
    levels = [cover(large, image, shape, stride) for shape, stride in zip(shapes, strides, strict=True)]
    ious = [
        _best_iou(boxes, level, stride, _anchors(sizes, ratios, stride, boxes.device))
        for level, stride in zip(levels, strides, strict=True)
    ]
    best = boxes.new_zeros(len(boxes))
    for level, iou in zip(levels, ious, strict=True):
        best.scatter_reduce_(0, level.box, iou, "amax")
    masks = [torch.zeros(shape, dtype=torch.bool, device=boxes.device) for shape in shapes]
    for mask, level, iou in zip(masks, levels, ious, strict=True):
        mask.view(-1)[level.cell[iou > phi * best[level.box]]] = True
    # The cells that a cache holds are counted in whole numbers; those above are rounded, and may be one cell more.
    stored = foreground_cells(batch.boxes, batch.geometry.canvas, strides, reach)
    return [mask & kept for mask, kept in zip(masks, stored, strict=True)]


def _anchors(sizes: tuple[float, ...], ratios: tuple[float, ...], stride: int, device: torch.device) -> Tensor:
    """(A, 2) float32 widths and heights in pixels."""
    size = torch.tensor(sizes, device=device)[:, None] * stride
    root = torch.tensor(ratios, device=device).sqrt()
    return torch.stack([size / root, size * root], dim=-1).flatten(0, 1)


def _best_iou(boxes: Tensor, level: Covered, stride: int, anchors: Tensor) -> Tensor:
    """(P,): of all anchors at a pair's cell, the greatest IoU with its box."""
    box, half = boxes[level.box][:, None], anchors / 2
    centre = level.centres(stride)[:, None]
    shared = (torch.minimum(box[..., 2:], centre + half) - torch.maximum(box[..., :2], centre - half)).clamp(min=0)
    overlap = shared.prod(-1)
    area = (box[..., 2:] - box[..., :2]).prod(-1) + anchors.prod(-1)
    return (overlap / (area - overlap)).amax(-1)
