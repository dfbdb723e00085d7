"""Normalisers that do not depend on batch mates."""

from torch import nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He, ECCV 2018, arXiv:1803.08494) for any channel count: up to 32 groups that divide
    `channels`, at least 4 channels in each, since a group of one channel on a 1 x 1 map would be all zeros."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)
