"""Which positions of a pyramid level are foreground: those that meet a slightly enlarged box of an object.

The writer of a sparse cache and the step that reads it ask this one function. It counts in whole numbers, so that a
processor and a GPU never differ by a cell. Shape letters: B images, N boxes of one image, M of all, h x w cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ENLARGED = 1.2
"""By how much a box grows about its centre before its positions count."""
_PARTS = 64
"""Box sides are rounded outwards to this part of a pixel."""
_THOUSAND = 1000


def level_sizes(canvas: tuple[int, int], strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The (h, w) of each level on a canvas of (H, W) pixels."""
    return tuple((-(-canvas[0] // s), -(-canvas[1] // s)) for s in strides)


def foreground_cells(
    boxes: Sequence[Tensor], canvas: tuple[int, int], strides: Sequence[int], enlarged: float = ENLARGED
) -> tuple[Tensor, ...]:
    """(B, h, w) bool per level: the cell shares area with an enlarged box, or holds one that has none.

    `boxes`: per image (N, 4) x1 y1 x2 y2 in pixels of the `canvas` (H, W). Ignored regions are no foreground: they are
    not asked about. A cell of stride s covers s x s pixels. Larger `enlarged` never gives fewer positions.
    """
    if enlarged < 1:
        raise ValueError(f"boxes may be enlarged by a factor of at least 1, got {enlarged}")
    edges = _edges(torch.cat(tuple(boxes)), enlarged)
    counts = torch.tensor([len(b) for b in boxes], device=edges.device)
    sizes = level_sizes(canvas, strides)
    image = torch.repeat_interleave(counts, output_size=len(edges))
    return tuple(_painted(edges, image, len(boxes), size, s) for size, s in zip(sizes, strides, strict=True))


def _edges(boxes: Tensor, enlarged: float) -> Tensor:
    """(M, 4) int64: the enlarged boxes' sides, in `_PARTS` of a pixel, rounded outwards."""
    fine = boxes.double() * _PARTS  # exact, as is the rounding
    low, high = fine[:, :2].floor().long(), fine[:, 2:].ceil().long()
    margin = -((low - high) * (round(enlarged * _THOUSAND) - _THOUSAND) // (2 * _THOUSAND))
    return torch.cat([low - margin, high + margin], dim=1)


def _painted(edges: Tensor, image: Tensor, images: int, size: tuple[int, int], stride: int) -> Tensor:
    """(images, h, w) bool: the cells that the boxes meet; at least one for each box."""
    cell = stride * _PARTS
    limit = edges.new_tensor([size[1], size[0]])
    first = torch.div(edges[:, :2], cell, rounding_mode="floor").clamp(min=0).minimum(limit - 1)
    last = -torch.div(-edges[:, 2:], cell, rounding_mode="floor")
    last = last.minimum(limit).maximum(first + 1)
    (x1, y1), (x2, y2) = first.unbind(1), last.unbind(1)
    # +1 where a box begins and -1 behind its end, in both directions: sums from the corner count the boxes of a cell.
    width = size[1] + 1
    marks = torch.zeros(images, size[0] + 1, width, dtype=torch.int32, device=edges.device)
    one = torch.ones_like(image, dtype=torch.int32)
    base = image * (size[0] + 1)
    for y, x, sign in ((y1, x1, 1), (y1, x2, -1), (y2, x1, -1), (y2, x2, 1)):
        marks.view(-1).index_add_(0, (base + y) * width + x, sign * one)
    return marks.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)[:, :-1, :-1] > 0
