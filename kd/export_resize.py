"""torchvision's uint8 resize (bilinear, antialias) in operations that every ONNX runtime has, equal to the last bit.

ONNX's own Resize works in floats and rounds other pixels; a detector then finds slightly other boxes than in training.
ATen instead sums pixels times int16 weights in int32, rounds to uint8 after the columns and again after the rows.
"""

import math

import torch
from torch import Tensor, nn


class Resize(nn.Module):
    """(C, h, w) int32 pixels in 0..255 -> (C, H, W) int32, for one input and one output size, both (height, width)."""

    def __init__(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        super().__init__()
        self._columns = _Along(2, before[1], after[1]) if before[1] != after[1] else nn.Identity()
        self._rows = _Along(1, before[0], after[0]) if before[0] != after[0] else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        return self._rows(self._columns(pixels))


class _Along(nn.Module):
    """The resize along one dimension."""

    taps: Tensor
    """(T, n) int64: which T pixels a new pixel is made of."""
    weights: Tensor
    """(T, n) int32, in units of 2^-bits."""

    def __init__(self, dim: int, before: int, after: int) -> None:
        super().__init__()
        taps, weights, self._bits = _table(before, after)
        self._dim = dim
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("weights", weights if dim == 2 else weights[..., None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        total = torch.full((), 1 << (self._bits - 1), dtype=torch.int32)
        for tap, weight in zip(self.taps, self.weights, strict=True):
            total = total + pixels.index_select(self._dim, tap) * weight
        # Weights are positive, so that this division is a shift, which ONNX has for unsigned numbers alone.
        return torch.div(total, 1 << self._bits, rounding_mode="floor").clamp(0, 255)


def _table(before: int, after: int) -> tuple[Tensor, Tensor, int]:
    """ATen's `compute_index_ranges_int16_weights` for a triangle filter: taps, weights, bits."""
    scale = before / after
    support = max(scale, 1.0)
    rows: list[tuple[int, list[float]]] = []
    for i in range(after):
        center = scale * (i + 0.5)
        first = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), before) - first
        heights = [max(0.0, 1 - abs(j + first - center + 0.5) / support) for j in range(count)]
        rows.append((first, [height / math.fsum(heights) for height in heights]))
    bits, largest = 0, max(max(weights) for _, weights in rows)
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    most = max(len(weights) for _, weights in rows)
    table = torch.zeros(most, after, dtype=torch.int32)
    taps = torch.zeros(most, after, dtype=torch.int64)
    for i, (first, weights) in enumerate(rows):
        taps[: len(weights), i] = torch.arange(first, first + len(weights))
        table[: len(weights), i] = torch.tensor([int(weight * (1 << bits) + 0.5) for weight in weights])
    return taps, table, bits
