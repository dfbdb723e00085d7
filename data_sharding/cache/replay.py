"""Proof that a view replayed today shows the pixels that the teacher saw: 64 of them are kept beside its taps.

Decoders and resizers differ between versions, and code changes; a cached map of other pixels is 16 to 95 % off.
"""

import torch
from torch import Tensor

GRID = 8
TOLERANCE = 3.0
"""Mean difference of the kept pixels, in grey levels of 255: other versions of a JPEG decoder stay below 1."""


class ReplayDiffers(ValueError):
    """A view does not show what the teacher saw."""


def sampled(image: Tensor, size: tuple[int, int]) -> bytes:
    """64 values of a rendered view (3, H, W) uint8, on an 8 x 8 grid over its valid (height, width) at the top left;
    the colours take turns."""
    steps = 2 * torch.arange(GRID) + 1
    rows, columns = (steps * side // (2 * GRID) for side in size)
    colours = (torch.arange(GRID)[:, None] + torch.arange(GRID)) % 3
    return bytes(image[colours, rows[:, None], columns].flatten().tolist())


def difference(kept: bytes, found: bytes) -> float:
    """The mean absolute difference in grey levels."""
    return sum(abs(a - b) for a, b in zip(kept, found, strict=True)) / len(kept)
