"""Slicing covers every pixel, and finds each object of a sliced image once, where it is."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.detectors.base import Detections
from kd.slicing import SliceConfig, Tile, merge, sliced, tiles_of

Look = Callable[[Sequence[Tensor]], list[Detections]]


def detections(boxes: Sequence[Sequence[float]], labels: Sequence[int], scores: Sequence[float]) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
    )


def painted(height: int, width: int, objects: Sequence[tuple[Tile, int]]) -> Tensor:
    """(3, H, W): object i as pixels of value i + 1 in the first channel, its class in the second."""
    image = torch.zeros(3, height, width, dtype=torch.int64)
    for i, (box, label) in enumerate(objects):
        image[0, box.y1 : box.y2, box.x1 : box.x2] = i + 1
        image[1, box.y1 : box.y2, box.x1 : box.x2] = label
    return image


def seeing(images: Sequence[Tensor]) -> list[Detections]:
    """A perfect detector: exactly the visible part of every painted object."""
    return [_visible(image) for image in images]


def _visible(image: Tensor) -> Detections:
    boxes, labels, scores = [], [], []
    for value in image[0].unique().tolist():
        if value == 0:
            continue
        y, x = (image[0] == value).nonzero().unbind(1)
        boxes.append([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])
        labels.append(int(image[1, y[0], x[0]]))
        scores.append(0.3 + 0.6 * len(y) / image[0].numel())
    return detections(boxes, labels, scores)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, list[tuple[Tile, int]]]:
    """Objects at whole pixels, at least one pixel apart: each in a cell of a coarse grid, or several cells long."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    objects: list[tuple[Tile, int]] = []
    for _ in range(draw(st.integers(0, 6))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        box = Tile(x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height)))
        apart = all(box.x1 > o.x2 or o.x1 > box.x2 or box.y1 > o.y2 or o.y1 > box.y2 for o, _ in objects)
        if apart:
            objects.append((box, draw(st.integers(0, 1))))
    return height, width, objects


def config(size: tuple[int, int], **more: object) -> SliceConfig:
    return SliceConfig(size=size, **more)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("whole", [False, True])
def test_an_image_without_objects_has_none(whole: bool) -> None:
    found = sliced(painted(50, 70, []), seeing, config((20, 20), whole=whole))
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)


@settings(max_examples=200, deadline=None)
@given(
    scene=scenes(),
    size=st.tuples(st.integers(4, 60), st.integers(4, 60)),
    overlap=st.floats(0, 0.75),
    whole=st.booleans(),
)
def test_each_object_is_found_once_where_it_is(
    scene: tuple[int, int, list[tuple[Tile, int]]], size: tuple[int, int], overlap: float, whole: bool
) -> None:
    height, width, objects = scene
    found = sliced(painted(height, width, objects), seeing, config(size, overlap=overlap, whole=whole))
    told = sorted((*map(float, box), label) for box, label in objects)
    assert sorted((*b, n) for b, n in zip(found.boxes.tolist(), found.labels.tolist(), strict=True)) == told
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    overlap=st.floats(0, 0.9),
)
def test_tiles_cover_every_pixel_and_are_of_one_size(
    height: int, width: int, size: tuple[int, int], overlap: float
) -> None:
    if height * width / (size[0] * size[1] * (1 - overlap) ** 2) > 3000:
        return
    seen = torch.zeros(height, width, dtype=torch.bool)
    tiles = tiles_of(height, width, config(size, overlap=overlap, whole=False))
    for tile in tiles:
        assert 0 <= tile.x1 < tile.x2 <= width
        assert 0 <= tile.y1 < tile.y2 <= height
        assert (tile.y2 - tile.y1, tile.x2 - tile.x1) == (min(size[0], height), min(size[1], width))
        seen[tile.y1 : tile.y2, tile.x1 : tile.x2] = True
    assert seen.all()
    assert len(set(tiles)) == len(tiles)


def test_the_whole_image_is_a_tile_of_its_own_only_where_there_are_several() -> None:
    assert tiles_of(100, 100, config((100, 100))) == [Tile(0, 0, 100, 100)]
    assert tiles_of(100, 150, config((100, 100), overlap=0.5)) == [
        Tile(0, 0, 100, 100),
        Tile(50, 0, 150, 100),
        Tile(0, 0, 150, 100),
    ]


LEFT, RIGHT = Tile(0, 0, 100, 100), Tile(80, 0, 180, 100)


def test_two_looks_at_one_object_keep_the_surer_and_neighbours_stay_two() -> None:
    one = detections([[82, 40, 92, 50], [85.5, 40, 95.5, 50]], [0, 0], [0.6, 0.5])  # two people, of one tile
    two = detections([[2.5, 40, 12.5, 50]], [0], [0.9])  # the first again; to the second its IoU is 0.54
    found = merge([one, two], [LEFT, RIGHT], config((100, 100)))
    assert found.boxes.tolist() == [[82.5, 40, 92.5, 50], [85.5, 40, 95.5, 50]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])


def test_classes_are_never_joined() -> None:
    one, two = detections([[82, 40, 92, 50]], [0], [0.6]), detections([[2, 40, 12, 50]], [1], [0.9])
    assert merge([one, two], [LEFT, RIGHT], config((100, 100))).labels.tolist() == [1, 0]


def test_parts_of_an_object_longer_than_the_overlap_become_its_hull() -> None:
    one, two = detections([[20, 40, 99, 60]], [0], [0.6]), detections([[0, 41, 70, 61]], [0], [0.7])
    assert merge([one, two], [LEFT, RIGHT], config((100, 100))).boxes.tolist() == [[20, 40, 150, 61]]


def test_a_cut_part_that_agrees_with_nothing_goes_where_a_larger_box_covers_it_and_else_stays() -> None:
    whole = detections([[60, 20, 98, 80]], [0], [0.4])  # near its tile's right border, yet whole
    part = detections([[0, 45, 12, 55]], [0], [0.9])  # the other tile saw a corner of it and misjudged its height
    assert merge([whole, part], [LEFT, RIGHT], config((100, 100))).boxes.tolist() == [[60, 20, 98, 80]]
    nothing = detections([], [], [])
    assert merge([nothing, part], [LEFT, RIGHT], config((100, 100))).boxes.tolist() == [[80, 45, 92, 55]]


def test_detections_are_capped_best_first() -> None:
    image = painted(40, 40, [(Tile(x, 5, x + 2, 7), 0) for x in range(0, 40, 5)])
    found = sliced(image, seeing, config((20, 20), detections=3))
    assert len(found.boxes) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (0, 5)}, "at least 1"),
        ({"size": (5, 5), "overlap": 0.95}, r"overlap must be in \[0, 0.9\]"),
        ({"size": (5, 5), "match": 0.0}, "match must be above 0"),
        ({"size": (5, 5), "detections": 0}, "detections must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SliceConfig(**wrong)  # pyright: ignore[reportArgumentType]
