"""Promises of tiled views: together they show the whole image, each is replayed, and cut objects are not background."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.order import view_of
from data_sharding.record import Record
from data_sharding.tiles import Tiles, most_tiles, tile_crops
from data_sharding.views import View, ViewConfig, ViewTable, draw, evaluation, place_labels, render
from tests.data_sharding.tiny import tiny_dataset

NONE = np.zeros((0, 4), np.float32)
QUADRANTS = ViewConfig(tiles=Tiles(grid=(2, 2)), flip=0.0, short_side=None, buckets=((128, 128), (256, 256)))


def test_an_image_of_one_pixel_has_one_tile() -> None:
    assert tile_crops(Tiles(grid=(2, 2)), 1, 1) == ((0, 0, 1, 1),)
    assert tile_crops(Tiles(size=(8, 8), overlap=0.2), 1, 1) == ((0, 0, 1, 1),)
    assert most_tiles(Tiles(grid=(2, 2)), []) == 1


def test_quadrants_are_cut_in_the_middle() -> None:
    assert tile_crops(Tiles(grid=(2, 2)), 1361, 765) == (
        (0, 0, 680, 382),
        (680, 0, 681, 382),
        (0, 382, 680, 383),
        (680, 382, 681, 383),
    )


def test_sized_tiles_overlap_and_end_at_the_edge() -> None:
    crops = tile_crops(Tiles(size=(100, 100), overlap=0.2), 250, 100)
    assert crops == ((0, 0, 100, 100), (80, 0, 100, 100), (150, 0, 100, 100))


SIDES = st.integers(1, 400)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(Tiles, grid=st.tuples(st.integers(1, 5), st.integers(1, 5)))
    | st.builds(Tiles, size=st.tuples(st.integers(20, 300), st.integers(20, 300)), overlap=st.floats(0, 0.9)),
    SIDES,
    SIDES,
)
def test_tiles_cover_the_image_and_a_grid_covers_it_once(tiles: Tiles, width: int, height: int) -> None:
    shown = np.zeros((height, width), np.int64)
    for x, y, w, h in tile_crops(tiles, width, height):
        assert w >= 1
        assert h >= 1
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        if tiles.size is not None:
            assert (h, w) == (min(height, tiles.size[0]), min(width, tiles.size[1]))
        shown[y : y + h, x : x + w] += 1
    assert shown.min() >= 1
    assert tiles.grid is None or shown.max() == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "either grid or size"),
        ({"grid": (2, 2), "size": (9, 9)}, "either grid or size"),
        ({"grid": (0, 2)}, "two numbers above 0"),
        ({"grid": (2, 2), "overlap": 0.1}, "goes with size"),
        ({"size": (9, 9), "overlap": 1.0}, r"overlap must be in \[0, 1\)"),
    ],
)
def test_settings_that_say_nothing_are_told(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Tiles(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="crop and tiles exclude each other"):
        replace(QUADRANTS, crop=(9, 9))


def test_view_k_is_tile_k_and_replays_to_the_bit() -> None:
    image = torch.randint(0, 256, (3, 90, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shown = [draw(QUADRANTS, "a data set", 7, 130, 90, NONE, k) for k in range(8)]
    assert [view.crop for view in shown[:4]] == list(tile_crops(Tiles(grid=(2, 2)), 130, 90))
    assert [view.crop for view in shown[4:]] == [view.crop for view in shown[:4]]
    parts = [render(image, view)[:, : view.size[0], : view.size[1]] for view in shown[:4]]
    assert torch.equal(torch.cat([torch.cat(parts[:2], 2), torch.cat(parts[2:], 2)], 1), image)


def test_more_views_per_tile_are_further_flips_of_it() -> None:
    flipping = replace(QUADRANTS, count=8, flip=0.5)
    flips = {draw(flipping, "a data set", 7, 130, 90, NONE, 4 * i).flip for i in range(8)}
    assert flips == {True, False}


def test_objects_on_an_edge_are_learnt_where_enough_is_seen_and_ignored_elsewhere() -> None:
    boxes = np.array([[10, 10, 20, 20], [40, 10, 60, 20], [47, 30, 57, 40]], np.float32)
    record = Record(
        image_id=1,
        file_name="a",
        width=100,
        height=100,
        image=b"",
        boxes=boxes,
        labels=np.arange(3),
        annotation_ids=np.arange(3),
        areas=np.ones(3, np.float32),
        crowd=np.zeros(3, np.bool_),
        difficult=np.zeros(3, np.bool_),
    )
    left, right = (draw(QUADRANTS, "u", 1, 100, 100, NONE, k) for k in (0, 1))
    seen_left, seen_right = (place_labels(record, view, min_visible=0.4) for view in (left, right))
    # The second object is half in each, 0.3 of the third are on the left.
    assert seen_left[0].tolist() == [[10, 10, 20, 20], [40, 10, 50, 20]]
    assert seen_left[2].tolist() == [[47, 30, 50, 40]]
    assert seen_right[0].tolist() == [[0, 10, 10, 20], [0, 30, 7, 40]]
    assert seen_right[2].tolist() == []


def test_the_evaluation_sees_whole_images() -> None:
    assert evaluation(QUADRANTS).tiles is None
    with pytest.raises(ValueError, match=r"evaluation view of tiles resized to short_side \(600,\) is not determined"):
        evaluation(replace(QUADRANTS, short_side=(600,)))


def test_a_split_has_as_many_views_as_its_most_tiled_image(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path)  # 120 x 110, 250 x 100 and 90 x 200 px in turn
    sliced = replace(QUADRANTS, tiles=Tiles(size=(100, 100), overlap=0.1), count=2)
    table = ViewTable.open_or_draw(dataset, sliced)
    assert table.count == 2 * 4
    again = ViewTable.open_or_draw(dataset, sliced)
    assert again.uid == table.uid
    for position in range(len(table)):
        width, height = int(dataset.widths[position]), int(dataset.heights[position])
        crops = tile_crops(Tiles(size=(100, 100), overlap=0.1), width, height)
        shown = [table.view(position, k) for k in range(table.count)]
        assert [view.crop for view in shown] == [crops[k % len(crops)] for k in range(table.count)]
        assert all(isinstance(view, View) and view.index == k for k, view in enumerate(shown))
    epochs = np.stack([view_of(dataset.groups, epoch, table.count) for epoch in range(table.count)])
    assert (np.sort(epochs, 0) == np.arange(table.count)[:, None]).all()


def test_untiled_views_are_what_they_were_before_there_were_tiles() -> None:
    assert "tiles" not in ViewConfig().policy
    assert "tiles" not in ViewConfig().geometry
    assert "tiles" in QUADRANTS.policy
