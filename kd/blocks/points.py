"""The locations of a dense head: where they lie, what lies in them, and boxes coded as distances from them.

Shape letters: B images, L locations of all levels, R regions of one image. The coding is torchvision's
`BoxLinearCoder(normalize_by_size=True)`: distances to left, top, right, bottom in strides.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Points:
    """Every location of a canvas, finest level first, row by row."""

    xy: Tensor
    """(L, 2) float32, canvas pixels."""
    stride: Tensor
    """(L,) float32: pixels per cell of each location's level."""
    shapes: tuple[tuple[int, int], ...]
    """(rows, columns) of each level."""
    strides: tuple[int, ...]
    """Pixels per cell of each level."""
    offset: float
    """Where a location lies within its cell, in cells: 0 at its top left corner, 0.5 in its middle."""

    def inside_images(self, sizes: Tensor) -> Tensor:
        """(B, L) bool: the location lies on the image and not on the padding. `sizes` is (B, 2) height, width."""
        return (self.xy[None, :, 0] < sizes[:, 1:]) & (self.xy[None, :, 1] < sizes[:, :1])

    def inside_any(self, regions: tuple[Tensor, ...]) -> Tensor:
        """(B, L) bool: the location lies in one of the image's (R, 4) regions."""
        padded = pad_sequence(list(regions), batch_first=True)  # zeros enclose nothing
        x, y = self.xy[None, :, None, 0], self.xy[None, :, None, 1]
        x1, y1, x2, y2 = padded[:, None].unbind(-1)
        return ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).any(-1)


def grid(canvas: tuple[int, int], strides: tuple[int, ...], offset: float, device: torch.device) -> Points:
    """The locations of a canvas of (H, W) pixels; a level has ceil(H / stride) x ceil(W / stride) cells."""
    shapes = tuple((math.ceil(canvas[0] / s), math.ceil(canvas[1] / s)) for s in strides)
    xy = []
    for (rows, columns), stride in zip(shapes, strides, strict=True):
        y = (torch.arange(rows, device=device) + offset) * stride
        x = (torch.arange(columns, device=device) + offset) * stride
        xy.append(torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1).float())
    stride = torch.cat([torch.full((len(p),), float(s), device=device) for p, s in zip(xy, strides, strict=True)])
    return Points(torch.cat(xy), stride, shapes, strides, offset)


def squares(points: Points, side: float) -> Tensor:
    """(L, 4): boxes of `side` strides around the locations."""
    half = points.stride[:, None] * side / 2
    return torch.cat([points.xy - half, points.xy + half], dim=1)


def encode(xy: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
    """(..., 4) boxes -> (..., 4) distances from (..., 2) locations, in (...,) strides."""
    return torch.cat([xy - boxes[..., :2], boxes[..., 2:] - xy], dim=-1) / stride[..., None]


def decode(xy: Tensor, stride: Tensor, distances: Tensor) -> Tensor:
    """The inverse of `encode`, in float32."""
    pixels = distances.float() * stride[..., None]
    return torch.cat([xy - pixels[..., :2], xy + pixels[..., 2:]], dim=-1)


def centerness(distances: Tensor) -> Tensor:
    """(..., 4) distances -> (...,) in [0, 1], FCOS eq. 3.

    A location outside its box (there by the guarantee of `assign`) gets 1: it is the only one that the box has, and
    a low score would lose the box.
    """
    left, top, right, bottom = distances.unbind(-1)
    inside = distances.amin(-1) > 0
    ratio = torch.minimum(left, right) * torch.minimum(top, bottom)
    ratio = ratio / (torch.maximum(left, right) * torch.maximum(top, bottom)).clamp(min=1e-9)
    return torch.where(inside, ratio.clamp(0, 1).sqrt(), torch.ones_like(ratio))
