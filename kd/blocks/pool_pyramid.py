"""Comparing two maps at several sizes of cell.

Shape letters: B images, C channels, H x W cells.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.blocks.align import pool
from kd.blocks.divergence import share_of_mean, squared_error


def pooled_error(student: Tensor, teacher: Tensor, sizes: tuple[int, ...], images: Tensor) -> Tensor:
    """(B, C, H, W) twice -> this micro-batch's share of the mean squared error of the means over windows of k x k
    cells, averaged over the `sizes` k. Windows at the border cover the cells that exist."""
    pairs = ((pool(student.float(), k), pool(teacher.float(), k)) for k in sizes)
    return sum((share_of_mean(squared_error(s, t), images) for s, t in pairs), images.new_zeros(())) / len(sizes)


def region_error(student: Tensor, teacher: Tensor, grids: tuple[int, ...], images: Tensor) -> Tensor:
    """The same for the means over g x g regions of the whole plane, averaged over the `grids` g."""
    pairs = ((F.adaptive_avg_pool2d(student.float(), g), F.adaptive_avg_pool2d(teacher.float(), g)) for g in grids)
    return sum((share_of_mean(squared_error(s, t), images) for s, t in pairs), images.new_zeros(())) / len(grids)
