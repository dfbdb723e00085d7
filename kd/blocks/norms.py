"""Normalisers: one that does not depend on batch mates, and one over the global batch, which all ranks share."""

import torch
from torch import Tensor, nn

from data_sharding.world import World


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He, ECCV 2018, arXiv:1803.08494) for any channel count: up to 32 groups that divide
    `channels`, at least 4 channels in each, since a group of one channel on a 1 x 1 map would be all zeros."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def batch_standardised(x: Tensor, images: Tensor, world: World, eps: float = 1e-5) -> Tensor:
    """(B, C, H, W) -> float32, each channel with mean 0 and variance 1 over the global batch of `images` images:
    BatchNorm in training without affine, and the gradient through its statistics, whichever rank an image is on.

    Every rank must call it equally often. It cannot span accumulated micro-batches.
    """
    x = x.float()
    cells = images.clamp(min=1).double() * x[0, 0].numel()
    # The planes are centred before they are squared; sums of squares about zero would lose digits.
    own = x.mean(dim=(2, 3), keepdim=True)
    spread, own = (x - own).square().sum(dim=(2, 3)).double(), own[..., 0, 0].double()
    sums = torch.stack([own.sum(0), own.square().sum(0)]) * x[0, 0].numel()
    total, squares, within = world.sum_with_gradient(torch.cat([sums, spread.sum(0)[None]]))
    mean = total / cells
    variance = (within + squares) / cells - mean.square()
    scale = (variance.clamp(min=0) + eps).rsqrt()
    return (x - mean.float()[:, None, None]) * scale.float()[:, None, None]


def image_standardised(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, C, H, W) -> float32, each channel of each image with mean 0 and variance 1; a single cell becomes 0."""
    x = x.float()
    x = x - x.mean(dim=(2, 3), keepdim=True)
    return x * (x.square().mean(dim=(2, 3), keepdim=True) + eps).rsqrt()
