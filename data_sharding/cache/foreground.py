"""Which positions of its taps an image's sparse cache holds: the shared rule on the boxes of a stored view."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from data_sharding.cache.key import CacheKey
from data_sharding.codecs.foreground import foreground_cells
from data_sharding.view_apply import place_labels

if TYPE_CHECKING:
    from data_sharding.shards import PackedDataset
    from data_sharding.views import ViewTable

CHUNK = 64
"""Images asked about at once."""


def foreground_masks(
    key: CacheKey, dataset: "PackedDataset", views: "ViewTable", positions: Sequence[int], view: int
) -> tuple[Tensor | None, ...]:
    """Per tap (B, h, w) bool, None for a dense one, of images that share a canvas in this view."""
    if not key.sparse or key.enlarged is None:
        return (None,) * len(key.taps)
    canvas = views.view(int(positions[0]), view).canvas
    boxes = [_boxes(dataset, views, int(i), view) for i in positions]
    masks = foreground_cells(boxes, canvas, key.strides, key.enlarged)
    return tuple(mask if coding.sparse else None for mask, coding in zip(masks, key.coding, strict=True))


def foreground_rows(key: CacheKey, dataset: "PackedDataset", views: "ViewTable", view: int) -> np.ndarray:
    """(N, taps) int64: how many positions of each tap are foreground, of every image in a view; 0 for dense taps."""
    rows = np.zeros((len(dataset), len(key.taps)), np.int64)
    for chosen in _chunks(views, len(dataset), view):
        masks = foreground_masks(key, dataset, views, chosen.tolist(), view)
        for tap, mask in enumerate(masks):
            if mask is not None:
                rows[chosen, tap] = mask.sum((1, 2)).numpy()
    return rows


def _chunks(views: "ViewTable", images: int, view: int) -> Iterator[np.ndarray]:
    canvases = views.canvas_ids(np.full(images, view, np.int64))
    for canvas in np.unique(canvases):
        members = np.flatnonzero(canvases == canvas)
        yield from (members[i : i + CHUNK] for i in range(0, len(members), CHUNK))


def _boxes(dataset: "PackedDataset", views: "ViewTable", position: int, view: int) -> Tensor:
    """The boxes that a batch will hold of this image: ignored regions are not among them."""
    shown = views.view(position, view)
    return place_labels(dataset.record(position), shown, min_visible=views.config.min_visible)[0]
