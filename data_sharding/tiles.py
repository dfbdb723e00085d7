"""Which parts of an image tiled views show: a grid (VisDrone's four quadrants), or windows of one size (slicing)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

Crop = tuple[int, int, int, int]
"""(x, y, width, height) in source pixels."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Either `grid` or `size`. Tiles are counted row by row from the top left."""

    grid: tuple[int, int] | None = None
    """(rows, columns) of equal parts that share no pixel, for images of any size: [2, 2] are the quadrants."""
    size: tuple[int, int] | None = None
    """(height, width) in source pixels; the last of a row or column ends at the image's edge. An image that is
    smaller is taken whole."""
    overlap: float = 0.0
    """With `size`: the part of a tile that its neighbour shows again, so that an object on an edge is whole in one."""

    def __post_init__(self) -> None:
        if (self.grid is None) == (self.size is None):
            raise ValueError(f"views.tiles: needs either grid or size, got grid {self.grid} and size {self.size}")
        for name, given in (("grid", self.grid), ("size", self.size)):
            if given is not None and min(given) < 1:
                raise ValueError(f"views.tiles: {name} must be two numbers above 0, got {given}")
        if not 0 <= self.overlap < 1 or (self.overlap and self.size is None):
            raise ValueError(f"views.tiles: overlap must be in [0, 1) and goes with size, got {self.overlap}")


def tile_crops(tiles: Tiles, width: int, height: int) -> tuple[Crop, ...]:
    """All tiles of an image of `width` x `height` px. Together they cover it."""
    if tiles.grid is not None:
        rows, columns = (_parts(side, count) for side, count in zip((height, width), tiles.grid, strict=True))
    else:
        assert tiles.size is not None
        rows, columns = (
            _windows(side, length, tiles.overlap) for side, length in zip((height, width), tiles.size, strict=True)
        )
    return tuple((x, y, w, h) for y, h in rows for x, w in columns)


def most_tiles(tiles: Tiles, sizes: Iterable[tuple[int, int]]) -> int:
    """The largest number of tiles among images of these (width, height)."""
    return max((len(tile_crops(tiles, *size)) for size in set(sizes)), default=1)


def _parts(length: int, count: int) -> list[tuple[int, int]]:
    """(start, length) of `count` parts as equal as whole pixels allow; fewer where there are fewer pixels."""
    count = min(count, length)
    edges = [length * i // count for i in range(count + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]


def _windows(length: int, window: int, overlap: float) -> list[tuple[int, int]]:
    """(start, length) of windows that advance by their part without overlap."""
    if length <= window:
        return [(0, length)]
    step = max(1, round(window * (1 - overlap)))
    count = math.ceil((length - window) / step) + 1
    return [(min(i * step, length - window), window) for i in range(count)]
