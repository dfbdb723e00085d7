"""Which cells meet which boxes, against plain loops."""

import math
import random

import pytest
import torch
from torch import Tensor

from kd.blocks.foreground import Covered, all_boxes, cover, enlarged
from tests.kd import fake

SHAPE, STRIDE = (2, 5, 7), 8
"""40 x 56 pixels."""


def meets(box: list[float], row: int, column: int) -> bool:
    """Whether a cell shares area with a box, or holds the corner of one that has none, the last cells holding their
    far edges too."""
    spans = []
    for low, high, place, cells in ((box[0], box[2], column, SHAPE[2]), (box[1], box[3], row, SHAPE[1])):
        begin, end = place * STRIDE, (place + 1) * STRIDE
        shared = min(high, end) - max(low, begin) > 0
        held = begin <= low < end or (low >= end and place == cells - 1)
        spans.append(shared or held)
    return all(spans)


def boxes_of(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        x, y = draw.choice([draw.uniform(0, 56), 8.0 * draw.randint(0, 7)]), draw.uniform(0, 40)
        w, h = draw.choice([0.0, 0.4, 8.0, 30.0]), draw.choice([0.0, 1.0, 8.0, 20.0])
        found.append([x, y, min(x + w, 56), min(y + h, 40)])
    return torch.tensor(found), torch.tensor([draw.randint(0, 1) for _ in range(count)]).sort().values


def pairs(level: Covered) -> set[tuple[int, int]]:
    return set(zip(level.box.tolist(), level.cell.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_cell_is_covered_exactly_where_it_meets_a_box(seed: int) -> None:
    boxes, image = boxes_of(seed)
    level = cover(boxes, image, SHAPE, STRIDE)
    expected = {
        (m, (int(image[m]) * SHAPE[1] + row) * SHAPE[2] + column)
        for m, box in enumerate(boxes.tolist())
        for row in range(SHAPE[1])
        for column in range(SHAPE[2])
        if meets(box, row, column)
    }
    assert pairs(level) == expected
    assert len(level.box) == len(expected), "no pair twice"
    assert level.cells.tolist() == [sum(m == box for box, _ in expected) for m in range(len(boxes))]
    values = torch.rand(len(boxes))
    greatest, inside = torch.zeros(math.prod(SHAPE)), torch.zeros(math.prod(SHAPE), dtype=torch.bool)
    for box, cell in expected:
        greatest[cell], inside[cell] = max(greatest[cell], values[box]), True
    assert torch.equal(level.greatest(values), greatest.view(SHAPE))
    assert torch.equal(level.any(), inside.view(SHAPE))


def test_no_boxes_cover_nothing() -> None:
    boxes, image = all_boxes(fake.batch(2, 0))
    level = cover(boxes, image, SHAPE, STRIDE)
    assert (level.box.shape, level.cells.shape) == ((0,), (0,))
    assert not level.any().any()
    assert level.greatest(boxes.new_zeros(0)).sum() == 0


def test_every_box_has_a_cell_however_small_and_wherever() -> None:
    boxes = torch.tensor([[56.0, 40.0, 56.0, 40.0], [0.0, 0.0, 0.0, 0.0], [8.0, 8.0, 8.0, 8.0], [7.9, 7.9, 8.1, 8.1]])
    level = cover(boxes, torch.tensor([0, 0, 1, 1]), SHAPE, STRIDE)
    assert level.cells.tolist() == [1, 1, 1, 4]
    assert level.cell.tolist()[:3] == [34, 0, 35 + 8]


def test_centres_are_the_middles_of_the_cells() -> None:
    level = cover(torch.tensor([[17.0, 9.0, 18.0, 10.0]]), torch.tensor([1]), SHAPE, STRIDE)
    assert level.centres(STRIDE).tolist() == [[20.0, 12.0]]


def test_boxes_grow_about_their_centres() -> None:
    grown = enlarged(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 1.2)
    torch.testing.assert_close(grown, torch.tensor([[8.0, 16.0, 32.0, 64.0]]))


def test_boxes_of_all_images_know_whose_they_are() -> None:
    boxes, image = all_boxes(fake.batch(3, 2))
    assert boxes.shape == (6, 4)
    assert image.tolist() == [0, 0, 1, 1, 2, 2]
