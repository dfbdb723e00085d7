"""The Haar wavelet transform of a map: what is smooth at half the resolution, and three bands of detail.

Orthonormal: energy is kept and the inverse is exact. Shape letters: B images, C channels, H x W cells, h x w = half as
many, rounded up (a missing last row or column counts as zeros).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bands(x: Tensor, depth: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(B, C, H, W) -> what is smooth after `depth` halvings, (B, C, h, w), and per halving, finest first, the details
    (B, C, 3, h, w) across, down and both."""
    details = []
    for _ in range(depth):
        x, high = _split(x)
        details.append(high)
    return x, tuple(details)


def restore(low: Tensor, details: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
    """The inverse of `bands` for a map of `size` (H, W)."""
    sizes = [(x.shape[3], x.shape[4]) for x in details]
    for high, (height, width) in zip(reversed(details), [*reversed(sizes[:-1]), size], strict=True):
        low = _join(low, high)[:, :, :height, :width]
    return low


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, torch.stack([a - b + c - d, a + b - c - d, a - b - c + d], dim=2) / 2


def _join(low: Tensor, high: Tensor) -> Tensor:
    across, down, both = high.unbind(2)
    upper = torch.stack([low + across + down + both, low - across + down - both], dim=-1).flatten(-2)
    lower = torch.stack([low + across - down - both, low - across - down + both], dim=-1).flatten(-2)
    return torch.stack([upper, lower], dim=-2).flatten(-3, -2) / 2
