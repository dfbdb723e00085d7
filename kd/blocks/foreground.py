"""Which cells of a pyramid level lie on objects, and how much each of them counts.

A cell is foreground when it meets a box: it shares area with it, or holds it. So no box is too small for a level, and
none claims a cell beside it. Every list here is as long as the cells that boxes cover, never boxes times cells.

Shape letters: B images, M boxes of all images, P pairs of a box and one of its cells, H x W cells of a level.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch


@dataclass(frozen=True)
class Covered:
    """Every cell of one level that meets a box, once for each box that it meets."""

    box: Tensor
    """(P,) int64 index into the boxes of all images, ascending."""
    cell: Tensor
    """(P,) int64 index into the B * H * W cells of all images."""
    cells: Tensor
    """(M,) int64: how many cells each box meets, at least 1."""
    shape: tuple[int, int, int]
    """(B, H, W)."""

    def any(self) -> Tensor:
        """(B, H, W) bool: the cell meets a box."""
        found = torch.zeros(self.shape, dtype=torch.bool, device=self.cell.device)
        found.view(-1)[self.cell] = True
        return found

    def greatest(self, values: Tensor) -> Tensor:
        """(M,) values >= 0 of the boxes -> (B, H, W): the greatest of those a cell meets, 0 where it meets none."""
        found = values.new_zeros(self.shape)
        found.view(-1).scatter_reduce_(0, self.cell, values[self.box], "amax")
        return found

    def background(self) -> Tensor:
        """(B, H, W) float32: 1 / their number on the cells of an image that meet no box, 0 elsewhere."""
        return even((~self.any()).float())

    def centres(self, stride: int) -> Tensor:
        """(P, 2) float32: x and y of the cells' centres in canvas pixels."""
        _, height, width = self.shape
        place = torch.stack([self.cell % width, self.cell // width % height], dim=1)
        return (place + 0.5) * stride


def all_boxes(batch: Batch) -> tuple[Tensor, Tensor]:
    """(M, 4) float32 boxes of all images, one image after the other, and (M,) int64 whose they are."""
    boxes = torch.cat(batch.boxes)
    counts = torch.tensor([len(b) for b in batch.boxes], device=boxes.device)
    return boxes, torch.repeat_interleave(counts, output_size=len(boxes))


def cover_objects(batch: Batch, like: Tensor, stride: int) -> Covered:
    """The cells of a level `like` (B, C, H, W) of `stride` that meet the labelled boxes. Ignored regions are none."""
    return cover(*all_boxes(batch), (len(like), like.shape[2], like.shape[3]), stride)


def even(weights: Tensor) -> Tensor:
    """(B, H, W) weights >= 0 with each image's sum brought to 1, or left at 0."""
    total = weights.sum(dim=(1, 2), keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def cover(boxes: Tensor, image: Tensor, shape: tuple[int, int, int], stride: int) -> Covered:
    """The cells of a (B, H, W) level of `stride` that meet boxes (M, 4) in canvas pixels of images (M,)."""
    _, height, width = shape
    limit = torch.tensor([width, height], device=boxes.device)
    # A box of no area, or one that begins where the canvas ends, has the cell that holds its corner.
    first = (boxes[:, :2] / stride).floor().long().clamp(min=0).minimum(limit - 1)
    last = (boxes[:, 2:] / stride).ceil().long().minimum(limit).maximum(first + 1)
    across, down = (last - first).unbind(1)
    count = across * down
    box = torch.arange(len(boxes), device=boxes.device).repeat_interleave(count)
    within = torch.arange(len(box), device=boxes.device) - (count.cumsum(0) - count)[box]
    row, column = first[box, 1] + within // across[box], first[box, 0] + within % across[box]
    return Covered(box, (image[box] * height + row) * width + column, count, shape)


def enlarged(boxes: Tensor, factor: float) -> Tensor:
    """(M, 4) boxes, `factor` times as wide and as high about the same centres."""
    margin = (boxes[:, 2:] - boxes[:, :2]) * ((factor - 1) / 2)
    return torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], dim=1)
