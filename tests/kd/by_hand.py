"""Small sums in float64 and plain Python, for tests that compare a method with its equation."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

Cell = tuple[int, int, int, int]
"""Image, level, row, column."""


def cells(maps: Sequence[Tensor]) -> Iterator[Cell]:
    """Every cell of (B, C, H, W) maps, image by image, finest level first, row by row: the order of flat answers."""
    for image in range(len(maps[0])):
        for level, x in enumerate(maps):
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    yield image, level, row, column


def at(maps: Sequence[Tensor], cell: Cell) -> list[float]:
    """The numbers of one cell."""
    image, level, row, column = cell
    return maps[level][image, :, row, column].double().tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(x: Sequence[float]) -> list[float]:
    total = sum(math.exp(v - max(x)) for v in x)
    return [math.exp(v - max(x)) / total for v in x]


def kl(target: Sequence[float], found: Sequence[float]) -> float:
    """Of probabilities: sum t log(t / f)."""
    return sum(t * math.log(t / f) for t, f in zip(target, found, strict=True) if t > 0)


def coin(target: float, found: float) -> float:
    """The divergence of two coins, given by their logits."""
    t, f = sigmoid(target), sigmoid(found)
    return kl([t, 1 - t], [f, 1 - f])


def area(a: Sequence[float]) -> float:
    return max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1])


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return shared / (area(a) + area(b) - shared)


def middle(a: Sequence[float]) -> tuple[float, float]:
    return (a[0] + a[2]) / 2, (a[1] + a[3]) / 2


def smooth_l1(a: float, b: float) -> float:
    return (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5
