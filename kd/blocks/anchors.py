"""The anchors of a dense head: torchvision's, on a canvas whose levels have ceil sizes, and what lies under them.

Shape letters: B images, L anchors of all levels, R regions of one image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from kd.blocks.align import grid

_FINE = 65536
"""Anchors that need not end on whole pixels end on fractions of so many."""


def check_anchors(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> None:
    """Raise ValueError where a detector's `anchor_sizes` and `anchor_ratios` are no anchors."""
    for name, values in (("sizes", sizes), ("ratios", ratios)):
        if not values or min(values) <= 0:
            raise ValueError(f"anchor_{name} must be one or more numbers above 0, got {values}")


@dataclass(frozen=True)
class Anchors:
    """Every anchor of a canvas, finest level first, row by row, cell by cell."""

    boxes: Tensor
    """(L, 4) float32, canvas pixels."""
    shapes: tuple[tuple[int, int], ...]
    """(rows, columns) of each level."""
    per_cell: int
    """Anchors that share a cell."""
    strides: tuple[int, ...]
    """Pixels per cell of each level."""

    @property
    def stride(self) -> Tensor:
        """(L,) float32: pixels per cell of each anchor's level."""
        each = zip(self.lengths, self.strides, strict=True)
        return torch.cat([torch.full((n,), float(s), device=self.boxes.device) for n, s in each])

    @property
    def lengths(self) -> list[int]:
        """Anchors of each level."""
        return [rows * columns * self.per_cell for rows, columns in self.shapes]

    def inside_images(self, sizes: Tensor) -> Tensor:
        """(B, L) bool: the centre lies on the image and not on the padding. `sizes` is (B, 2) height, width."""
        centres = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
        return (centres[None] < sizes.flip(1)[:, None]).all(-1)


@dataclass(frozen=True, kw_only=True)
class AnchorShapes:
    """The anchors of one cell."""

    sizes: tuple[float, ...]
    """Square roots of their areas, in strides of their level."""
    ratios: tuple[float, ...]
    """Height / width."""
    whole_pixels: bool = True
    """Round sizes down and corners to whole pixels, as torchvision does."""

    @property
    def per_cell(self) -> int:
        """How many anchors there are."""
        return len(self.sizes) * len(self.ratios)

    def on(self, canvas: tuple[int, int], strides: tuple[int, ...], device: torch.device) -> Anchors:
        """The anchors of a canvas of (H, W) pixels; those of a cell stand around its top left corner."""
        maker = AnchorGenerator(tuple((s,) for s in strides), (self.ratios,) * len(strides))
        maker.cell_anchors = [self._of_cell(maker, stride).to(device) for stride in strides]
        shapes = tuple(grid(canvas, stride) for stride in strides)
        # Its forward would take ceil-sized levels for levels of another stride.
        boxes = maker.grid_anchors([list(shape) for shape in shapes], [[s, s] for s in strides])  # pyright: ignore
        return Anchors(torch.cat(boxes), shapes, self.per_cell, strides)

    def _of_cell(self, maker: AnchorGenerator, stride: int) -> Tensor:
        """(A, 4) float32 around the origin."""
        sizes = [size * stride for size in self.sizes]
        if self.whole_pixels:
            return maker.generate_anchors([max(1, int(size)) for size in sizes], list(self.ratios))
        scales: list = [size * _FINE for size in sizes]
        return maker.generate_anchors(scales, list(self.ratios)) / _FINE


def under_any(boxes: Tensor, regions: Tensor, overlap: float) -> Tensor:
    """(N, 4) boxes, (R, 4) ignored regions -> (N,) bool: the centre lies in a region, or the box would answer for it
    if it were an object (IoU of at least `overlap`)."""
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    inside = ((centres >= regions[None, :, :2]) & (centres < regions[None, :, 2:])).all(-1)
    return (inside | (box_iou(boxes, regions) >= overlap)).any(-1)
