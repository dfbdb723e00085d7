"""Which of two codecs errs less on a teacher's own taps: measured on a few images before a cache is planned."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_sharding.batch import Taps
from data_sharding.cache.foreground import foreground_masks
from data_sharding.cache.key import CacheKey
from data_sharding.codecs.catalogue import CHOICES, codec, decode

if TYPE_CHECKING:
    from data_sharding.shards import PackedDataset
    from data_sharding.views import ViewTable

IMAGES = 8
"""On how many codecs are compared."""

Errors = dict[str, float]
"""Codec -> relative L2 error, in the order of `CHOICES`."""


def candidates(asked: str) -> tuple[str, ...]:
    """The codecs between which a recipe's word leaves the choice; a codec's own name leaves none."""
    return CHOICES.get(asked, (asked,))


def is_open(asked: Sequence[str]) -> bool:
    """Whether something is left to measurement."""
    return any(name in CHOICES for name in asked)


def measured(
    asked: Sequence[str], taps: Sequence[str], samples: Iterable[Sequence[tuple[Tensor, Tensor | None]]]
) -> list[Errors]:
    """Per tap the error ||decoded - x|| / ||x|| over all samples of each candidate; empty where nothing is open.

    A sample is one image: per tap its map (C, h, w) and, where only foreground is stored, the mask (h, w), outside of
    which nothing counts.
    """
    squares = [[torch.zeros(2, dtype=torch.float64) for _ in candidates(name)] for name in asked]
    for sample in samples:
        for name, tap, (x, mask), sums in zip(asked, taps, sample, squares, strict=True):
            if name in CHOICES:
                for one, total in zip(candidates(name), sums, strict=True):
                    total += _squares(one, x, mask, tap)
    return [
        {one: _ratio(total) for one, total in zip(candidates(name), sums, strict=True)} if name in CHOICES else {}
        for name, sums in zip(asked, squares, strict=True)
    ]


def compared(
    key: CacheKey,
    asked: Sequence[str],
    dataset: "PackedDataset",
    views: "ViewTable",
    taps_of: Callable[[np.ndarray, int], Taps],
) -> list[Errors]:
    """`measured` on a few images, evenly spread over those with objects, one at a time and in view 0.

    `key` has some codec of the asked kind for each tap; `taps_of` is what fills the cache.
    """

    def samples() -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        there = np.flatnonzero(dataset.objects) if dataset.objects.any() else np.arange(len(dataset))
        for position in there[np.unique(np.linspace(0, len(there) - 1, IMAGES).round().astype(np.int64))]:
            canvas = views.view(int(position), 0).canvas
            tensors = key.layout.split(taps_of(position[None], 0), 1, canvas)
            masks = foreground_masks(key, dataset, views, [int(position)], 0)
            yield [(x[0].cpu(), None if m is None else m[0]) for x, m in zip(tensors, masks, strict=True)]

    return measured(asked, key.taps, samples())


def chosen(asked: Sequence[str], errors: Sequence[Errors]) -> tuple[str, ...]:
    """The codec of each tap: of several that err equally little, the first."""
    return tuple(
        min(found, key=lambda one: found[one]) if found else name for name, found in zip(asked, errors, strict=True)
    )


def _squares(name: str, x: Tensor, mask: Tensor | None, tap: str) -> Tensor:
    """(2,) float64: sums of squares of the error and of the tap."""
    kept = x if mask is None else x * mask
    back = decode(codec(name).encode(x, mask, level=tap), name, (x.shape[0], x.shape[1], x.shape[2]), level=tap)
    return torch.stack([(back - kept).double().square().sum(), kept.double().square().sum()])


def _ratio(squares: Tensor) -> float:
    error, whole = squares.tolist()
    return (error / whole) ** 0.5 if whole else 0.0
