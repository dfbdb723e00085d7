import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from data_sharding.codecs.foreground import foreground_cells

CANVAS, STRIDES = (128, 192), (8, 16, 32, 64)
SIZES = ((16, 24), (8, 12), (4, 6), (2, 3))


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def by_hand(one: Tensor, size: tuple[int, int], stride: int, enlarged: Fraction) -> Tensor:
    """The same, cell by cell, in fractions."""
    found = torch.zeros(size, dtype=torch.bool)
    for x1, y1, x2, y2 in [[Fraction(v) for v in row] for row in one.tolist()]:
        dx, dy = (x2 - x1) * (enlarged - 1) / 2, (y2 - y1) * (enlarged - 1) / 2
        for i in range(size[0]):
            for j in range(size[1]):
                across = x1 - dx < (j + 1) * stride and x2 + dx > j * stride
                found[i, j] |= across and y1 - dy < (i + 1) * stride and y2 + dy > i * stride
    return found


def test_without_boxes_nothing_is_foreground() -> None:
    masks = foreground_cells([boxes(), boxes()], CANVAS, STRIDES)
    assert [tuple(m.shape) for m in masks] == [(2, *size) for size in SIZES]
    assert not any(m.any() for m in masks)


@pytest.mark.parametrize("enlarged", ["1", "1.2", "2.5"])
def test_a_cell_counts_when_it_shares_area_with_an_enlarged_box(enlarged: str) -> None:
    generator = torch.Generator().manual_seed(3)
    images = []
    for count in (0, 1, 5, 12):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([180.0, 110.0])
        side = torch.rand(count, 2, generator=generator).square() * 40 + 0.5
        # A 64th of a pixel is what the function resolves; what lies between is rounded outwards.
        images.append((torch.cat([corner, (corner + side).clamp(max=192)], 1) * 2).round() / 2)
    masks = foreground_cells(images, CANVAS, STRIDES, float(enlarged))
    for size, stride, mask in zip(SIZES, STRIDES, masks, strict=True):
        for one, found in zip(images, mask, strict=True):
            assert torch.equal(found, by_hand(one, size, stride, Fraction(enlarged)))


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ((8, 8, 16, 16), {(1, 1)}),  # exactly one cell; its neighbours only touch it
        ((8, 8, 16.01, 16), {(1, 1), (1, 2)}),
        ((184, 120, 192, 128), {(15, 23)}),  # the last corner of the canvas
        ((20, 20, 20, 20), {(2, 2)}),  # no area: the cell that holds it
        ((192, 128, 192, 128), {(15, 23)}),
    ],
)
def test_cells_of_a_box_without_enlargement(box: tuple[float, ...], cells: set[tuple[int, int]]) -> None:
    (mask,) = foreground_cells([boxes(box)], CANVAS, [8], 1.0)  # type: ignore[arg-type]  # any length
    assert {tuple(c) for c in mask[0].nonzero().tolist()} == cells


def test_more_enlargement_never_gives_fewer_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(9, 2, generator=generator) * 100
    some = [torch.cat([corner, corner + torch.rand(9, 2, generator=generator) * 20], 1)]
    last = foreground_cells(some, CANVAS, STRIDES, 1.0)
    for enlarged in (1.0, 1.1, 1.2, 1.5, 3.0):
        now = foreground_cells(some, CANVAS, STRIDES, enlarged)
        assert all((a <= b).all() for a, b in zip(last, now, strict=True))
        last = now
    assert math.prod(last[0].shape) > int(last[0].sum())


def test_shrinking_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="factor of at least 1, got 0"):
        foreground_cells([boxes()], CANVAS, STRIDES, 0.5)
