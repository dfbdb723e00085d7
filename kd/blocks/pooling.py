"""Adaptive average pooling by products with fixed weights: torch's own has no deterministic backward on a GPU.

Shape letters: P maps, C channels.
"""

import torch
from torch import Tensor


def pooled(maps: Tensor, size: int) -> Tensor:
    """(P, C, H, W) -> (P, C, size, size): the means of adaptive pooling."""
    down, across = (_means(length, size, maps) for length in maps.shape[2:])
    return down @ maps @ across.T


def _means(length: int, size: int, like: Tensor) -> Tensor:
    """(size, length): rows that take the mean over the parts of adaptive pooling."""
    place, part = torch.arange(length, device=like.device), torch.arange(size, device=like.device)[:, None]
    inside = (place >= part * length // size) & (place < -(-(part + 1) * length // size))
    return inside.to(like.dtype) / inside.sum(dim=1, keepdim=True)
