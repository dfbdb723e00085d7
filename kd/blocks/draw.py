"""Random samples and masks, each image's a function of its key alone.

Shape letters: N answers of one image, B images, H x W cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_sharding.keyed import uniforms


def draw(positive: Tensor, negative: Tensor, most: int, share: float, key: tuple[object, ...]) -> Tensor:
    """(N,) bool of positives and negatives -> (N,) bool: up to `most` of them, up to a `share` positive and the rest
    negative (as torchvision's BalancedPositiveNegativeSampler, but keyed). The same key draws the same, on any
    machine and beside any batch mates."""
    chance = torch.from_numpy(uniforms(*key, count=len(positive))).to(positive.device)
    chosen = _first(positive, chance, int(most * share))
    rest = most - chosen.sum()
    return chosen | _first(negative, chance, rest)


def _first(mask: Tensor, chance: Tensor, count: Tensor | int) -> Tensor:
    """The `count` of the mask's members with the least chance."""
    order = torch.where(mask, chance, 2.0).argsort()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return mask & (place < count)


def chances(key: tuple[object, ...], images: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """(B, H, W) float64 on the CPU: even numbers in [0, 1) for every cell of every image, each image's a function of
    `key` and its id alone."""
    rows = [torch.from_numpy(uniforms(*key, image, count=shape[0] * shape[1])).view(shape) for image in images]
    return torch.stack(rows)
