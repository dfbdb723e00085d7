"""What a student's cells say to the heads of an instance decoder, and how far that is from what the teacher's say.

Shape letters: B images, Q inquiries of an image, C channels, H x W cells of a level, U cells of all levels, M heads.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.batch import Batch
from kd.blocks.adapt import MatchChannels
from kd.blocks.box_cells import box_cells
from kd.blocks.foreground import cover_objects

Values = Literal["own", "shared"]


class StudentValues(nn.Module):
    """`own`: a projection of the student's own. `shared`: the teacher's values' projection, after a 1x1 convolution
    where the widths differ; a student that equals its teacher then has its teacher's values."""

    def __init__(self, kind: Values, student: int, teacher: int, width: int, levels: int) -> None:
        super().__init__()
        self.project = nn.Linear(student, width) if kind == "own" else None
        self.match = MatchChannels(student, teacher, levels) if kind == "shared" else None

    def forward(self, levels: tuple[Tensor, ...], weight: Tensor, bias: Tensor) -> Tensor:
        """(B, C, H, W) per level, and the teacher's projection (width, C_teacher) and (width,) -> (B, U, width)."""
        levels = levels if self.match is None else self.match(levels)
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        return F.linear(cells, weight, bias) if self.project is None else self.project(cells)


def value_error(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """(B, U, width) twice -> (B, M, U): the mean squared difference of a head's values, each cell's normalised."""

    def normal(x: Tensor) -> Tensor:
        split = x.float().unflatten(2, (heads, -1))
        return F.layer_norm(split, split.shape[-1:])

    return (normal(student) - normal(teacher)).square().mean(dim=-1).transpose(1, 2)


def own_share(boxes: Tensor, batch: Batch, level: Tensor, stride: int) -> Tensor:
    """Boxes (B, Q, 4) -> (B, Q, U) over the cells of a level (B, C, H, W): 0 outside the box, 1 inside it, and more
    where a smaller labelled object overlaps it, by the ratio of their cells (HMKD's M K H W)."""
    inside = box_cells(boxes, (level.shape[2], level.shape[3]), stride).flatten(2)
    covered = cover_objects(batch, level, stride)
    return inside * covered.greatest(1 / covered.cells).flatten(1)[:, None] * inside.sum(dim=2, keepdim=True)
