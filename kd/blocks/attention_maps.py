"""Where a map is strong: attention without parameters, in float32.

Shape letters: B images, C channels, H x W cells.
"""

import torch.nn.functional as F
from torch import Tensor


def spatial_attention(x: Tensor, temperature: float) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): softmax over an image's cells of their mean magnitude / T, times H * W, so that
    its mean is 1."""
    strength = x.float().abs().mean(dim=1, keepdim=True)
    return (strength.flatten(1) / temperature).softmax(dim=1).view_as(strength) * strength[0].numel()


def channel_attention(x: Tensor, temperature: float) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1): softmax over channels of their mean magnitude / T, times C."""
    strength = x.float().abs().mean(dim=(2, 3), keepdim=True)
    return (strength / temperature).softmax(dim=1) * x.shape[1]


def energy_map(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W): the mean square of each cell, as a vector of length 1 (0 for a map of zeros)."""
    return F.normalize(x.float().square().mean(dim=1).flatten(1), dim=1)
