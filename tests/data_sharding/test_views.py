"""Promises of views: a function of their key alone, replayed to the bit, boxes where the pixels are."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding import views
from data_sharding.datasets.base import Source
from data_sharding.pack import pack
from data_sharding.record import Category, Record
from data_sharding.shards import PackedDataset

UID = "a data set"
NONE = np.zeros((0, 4), np.float32)
PLAIN = views.ViewConfig(flip=0.0, short_side=(128,), buckets=((128, 128), (128, 256), (256, 128)))


def _image(width: int, height: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _draw(config: views.ViewConfig, width: int = 200, height: int = 150, boxes: np.ndarray = NONE, k: int = 0):
    return views.draw(config, UID, 7, width, height, boxes, k)


@st.composite
def configs(draw: st.DrawFn) -> views.ViewConfig:
    low = draw(st.floats(0.5, 1.0))
    return views.ViewConfig(
        count=3,
        crop=draw(st.none() | st.tuples(st.integers(1, 200), st.integers(1, 200))),
        short_side=draw(st.none() | st.lists(st.integers(1, 200), min_size=1, max_size=3).map(tuple)),
        long_side=draw(st.integers(40, 300)),
        scale=(low, draw(st.floats(low, 1.5))),
        flip=0.5,
        buckets=draw(st.sampled_from([((128, 128),), ((128, 256), (256, 128)), ((256, 256), (128, 128))])),
    )


sides = st.integers(1, 300)


@settings(max_examples=60, deadline=None)
@given(configs(), sides, sides, st.integers(0, 2), st.data())
def test_a_view_is_inside_its_image_and_its_canvas(
    config: views.ViewConfig, width: int, height: int, k: int, data: st.DataObject
) -> None:
    x, y = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    box = np.array([[x, y, (x + width) / 2, (y + height) / 2]], np.float32)
    view = _draw(config, width, height, box, k)
    assert view == _draw(config, width, height, box, k)
    left, top, crop_w, crop_h = view.crop
    assert 0 <= left <= left + crop_w <= width
    assert 0 <= top <= top + crop_h <= height
    assert view.canvas in config.buckets
    assert 1 <= view.size[0] <= view.canvas[0]
    assert 1 <= view.size[1] <= view.canvas[1]
    assert all(type(v) is int for v in (*view.crop, *view.size, *view.canvas))
    placed, visible = views.place_boxes(box, view)
    assert (placed >= 0).all()
    assert (placed[:, 0::2] <= view.size[1]).all()
    assert (placed[:, 1::2] <= view.size[0]).all()
    assert (placed[:, 2:] >= placed[:, :2]).all()
    assert 0 <= float(visible) <= 1


@settings(max_examples=20, deadline=None)
@given(configs(), sides, sides)
def test_rendering_twice_is_equal_and_factor_two_is_exactly_twice_as_large(
    config: views.ViewConfig, width: int, height: int
) -> None:
    image, view = _image(width, height), _draw(config, width, height)
    once, double = views.render(image, view), views.render(image, view, 2)
    assert torch.equal(once, views.render(image, view))
    assert tuple(once.shape) == (3, *view.canvas)
    assert tuple(double.shape) == (3, 2 * view.canvas[0], 2 * view.canvas[1])
    for pixels, factor in ((once, 1), (double, 2)):
        assert not pixels[:, factor * view.size[0] :].any()
        assert not pixels[:, :, factor * view.size[1] :].any()


def test_the_plain_view_of_an_image_that_fits_is_the_image() -> None:
    image = _image(100, 90)
    view = _draw(replace(PLAIN, short_side=None), 100, 90)
    canvas = views.render(image, view)
    assert view == views.View(0, (0, 0, 100, 90), (90, 100), False, (128, 128))
    assert torch.equal(canvas[:, :90, :100], image)


def test_the_canvas_is_the_smallest_that_holds_the_image_and_else_the_image_shrinks() -> None:
    assert _draw(PLAIN, 200, 200).canvas == (128, 128)
    assert _draw(PLAIN, 300, 200) == views.View(0, (0, 0, 300, 200), (128, 192), False, (128, 256))
    assert _draw(PLAIN, 200, 300).canvas == (256, 128)
    # 128 x 640 fits nowhere: the wide canvas keeps it largest.
    assert _draw(PLAIN, 1000, 200) == views.View(0, (0, 0, 1000, 200), (51, 256), False, (128, 256))
    assert _draw(replace(PLAIN, long_side=200), 1000, 200).size == (40, 200)


def test_the_larger_rendering_is_resized_from_the_original_pixels() -> None:
    image = _image(256, 256)
    view = _draw(PLAIN, 256, 256)
    assert torch.equal(views.render(image, view, 2), image)
    assert not torch.equal(views.render(image, view, 2)[:, ::2, ::2], views.render(image, view))


@pytest.mark.parametrize("size", [(1, 1), (6, 1), (1, 6), (2, 3)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 1), (1, 9), (9, 5), (5, 9)])
def test_images_of_a_few_pixels_are_rendered_right(height: int, width: int, size: tuple[int, int]) -> None:
    image = _image(width, height)
    view = views.View(0, (0, 0, width, height), size, False, (128, 128))
    expected = torch.nn.functional.interpolate(
        image[None].double(), size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    rendered = views.render(image, view)[:, : size[0], : size[1]]
    assert (rendered - expected).abs().max() <= 1.5


def test_boxes_lie_where_the_pixels_are() -> None:
    config = replace(PLAIN, crop=(64, 64), flip=0.5, short_side=(128,), count=8)
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    image[:, 40:60, 30:50] = 255
    box = np.array([[30, 40, 50, 60]], np.float32)
    flips = set()
    for k in range(8):
        view = _draw(replace(config, crop_on_object=1.0), 100, 100, box, k)
        flips.add(view.flip)
        placed, visible = views.place_boxes(box, view)
        assert float(visible) == 1.0
        canvas = views.render(image, view)
        rows, columns = (np.flatnonzero((canvas[0] > 127).any(axis).numpy()) for axis in (1, 0))
        assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == placed[0].tolist()
        assert torch.equal(views.restore_boxes(placed, view), torch.from_numpy(box))
    assert flips == {True, False}


def test_a_flip_mirrors_pixels_and_boxes() -> None:
    view = views.View(0, (0, 0, 10, 4), (4, 10), False, (128, 128))
    flipped = replace(view, flip=True)
    image = _image(10, 4)
    assert torch.equal(views.render(image, flipped)[:, :4, :10], image.flip(2))
    assert views.place_boxes(np.array([[1, 0, 3, 4]]), flipped)[0].tolist() == [[7, 0, 9, 4]]


def test_crops_hold_an_object_as_often_as_told() -> None:
    box = np.array([[700, 700, 720, 720]], np.float32)
    config = views.ViewConfig(crop=(64, 64), short_side=None, buckets=((128, 128),))

    def hits(chance: float) -> int:
        found = (_draw(replace(config, crop_on_object=chance), 1000, 1000, box, k) for k in range(100))
        return sum(float(views.place_boxes(box, view)[1]) == 1.0 for view in found)

    assert hits(1.0) == 100
    assert 40 <= hits(0.6) <= 80
    assert hits(0.0) < 10


def test_a_crop_inside_an_object_larger_than_it_sees_nothing_else() -> None:
    box = np.array([[100, 100, 900, 900]], np.float32)
    config = views.ViewConfig(crop=(64, 64), crop_on_object=1.0, short_side=None, buckets=((128, 128),))
    for k in range(20):
        view = _draw(config, 1000, 1000, box, k)
        assert views.place_boxes(box, view)[0][0, 2:].tolist() == [64, 64]


def test_views_depend_on_their_key_and_on_nothing_else() -> None:
    config = views.ViewConfig(crop=(50, 50), short_side=None, buckets=((128, 128),))
    first = _draw(config, 500, 500)
    np.random.default_rng(0).random(10)
    torch.manual_seed(3)
    assert _draw(config, 500, 500) == first
    assert _draw(replace(config, count=9, photometric="student_only", min_visible=0.5), 500, 500) == first
    others = {
        views.draw(config, "another", 7, 500, 500, NONE, 0).crop,
        views.draw(config, UID, 8, 500, 500, NONE, 0).crop,
        _draw(config, 500, 500, NONE, 1).crop,
    }
    assert len(others | {first.crop}) == 4


def _record(**changes: object) -> Record:
    corners = [[0, 0, 10, 10], [40, 40, 60, 60], [45, 0, 65, 20], [30, 30, 40, 40], [80, 80, 90, 90]]
    fields = {
        "image_id": 7,
        "file_name": "a",
        "width": 100,
        "height": 100,
        "image": b"",
        "boxes": np.array(corners, np.float32),
        "labels": np.arange(5),
        "annotation_ids": np.arange(5),
        "areas": np.ones(5, np.float32),
        "crowd": np.array([False, False, False, True, False]),
        "difficult": np.zeros(5, np.bool_),
        "ignore_regions": np.array([[20, 20, 60, 60], [60, 60, 70, 70]], np.float32),
    }
    return Record(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_an_image_without_objects_has_no_labels() -> None:
    empty = Record(image_id=1, file_name="a", width=100, height=100, image=b"")
    boxes, labels, ignore = views.place_labels(empty, _draw(PLAIN, 100, 100), min_visible=0.25)
    assert (boxes.shape, labels.shape, ignore.shape) == ((0, 4), (0,), (0, 4))
    assert (boxes.dtype, labels.dtype, ignore.dtype) == (torch.float32, torch.int64, torch.float32)


def test_crowds_and_hardly_visible_objects_are_ignored_and_others_dropped() -> None:
    view = views.View(0, (0, 0, 50, 50), (100, 100), False, (128, 128))
    boxes, labels, ignore = views.place_labels(_record(), view, min_visible=0.25)
    # Of object 1 and 2 a quarter is visible, object 3 is a crowd, object 4 and the second region are outside.
    assert labels.tolist() == [0, 1, 2]
    assert boxes.tolist() == [[0, 0, 20, 20], [80, 80, 100, 100], [90, 0, 100, 40]]
    assert ignore.tolist() == [[60, 60, 80, 80], [40, 40, 100, 100]]
    _, labels, ignore = views.place_labels(_record(), view, min_visible=0.3)
    assert labels.tolist() == [0]
    assert len(ignore) == 4


def test_objects_below_one_pixel_are_ignored() -> None:
    view = views.View(0, (0, 0, 100, 100), (9, 9), False, (128, 128))
    _, labels, ignore = views.place_labels(_record(), view, min_visible=0.25)
    assert labels.tolist() == [1, 2]
    assert len(ignore) == 5


def test_photometric_is_a_function_of_its_key_and_spares_the_padding() -> None:
    config = replace(PLAIN, photometric="student_only")
    view = _draw(config, 100, 70)
    canvas = views.render(_image(100, 70), view)
    first = views.photometric(canvas, view, config, (0, "photometric", 3, 7))
    assert torch.equal(first, views.photometric(canvas, view, config, (0, "photometric", 3, 7)))
    assert not torch.equal(first, views.photometric(canvas, view, config, (0, "photometric", 4, 7)))
    assert not torch.equal(first, canvas)
    assert first.dtype == torch.uint8
    assert not first[:, view.size[0] :].any()
    double = views.photometric(views.render(_image(100, 70), view, 2), view, config, (0,))
    assert double[:, 2 * view.size[0] - 1].any()
    assert not double[:, 2 * view.size[0] :].any()
    assert torch.equal(views.photometric(canvas, view, PLAIN, (0,)), canvas)


def test_evaluation_is_one_plain_view() -> None:
    config = views.ViewConfig(count=5, short_side=(64, 128), scale=(0.5, 2.0), buckets=((128, 256),))
    plain = views.evaluation(config)
    assert _draw(plain, 200, 100) == views.View(0, (0, 0, 200, 100), (128, 256), False, (128, 256))
    assert plain.count == 1
    with pytest.raises(ValueError, match="short_side to null"):
        views.evaluation(replace(config, crop=(10, 10)))


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"count.*short_side.*scale.*multiples of 128, got \(\(100, 128\),\).*flip"):
        views.ViewConfig(count=0, short_side=(), scale=(2, 1), buckets=((100, 128),), flip=2)


def _packed(folder: Path, count: int = 12) -> PackedDataset:
    rng = np.random.default_rng(0)

    def read(i: int) -> Record:
        width, height = (int(v) for v in rng.integers(60, 400, 2)) if i else (90, 60)
        return _record(image_id=100 + i, width=max(width, 100), height=max(height, 100), image=bytes(i))

    records = [read(i) for i in range(count)]
    source = Source(count=count, fingerprint="f", read=records.__getitem__)
    categories = tuple(Category(i, str(i)) for i in range(5))
    module = SimpleNamespace(categories=lambda _: categories, source=lambda *_: source)
    return pack(None, module, "train", folder, shard_bytes=20_000)  # pyright: ignore[reportArgumentType]


CROPS = views.ViewConfig(count=3, crop=(64, 64), short_side=(100, 200), buckets=((128, 128), (256, 256)))


def test_stored_views_are_the_drawn_ones_and_replay_to_the_bit(tmp_path: Path) -> None:
    dataset = _packed(tmp_path)
    drawn = views.ViewTable.open_or_draw(dataset, CROPS)
    read = views.ViewTable.open_or_draw(PackedDataset.open(tmp_path), CROPS)
    assert read.uid == drawn.uid
    assert len(read) == len(dataset)
    image = _image(400, 400)
    for i in range(len(dataset)):
        for k in range(3):
            record = dataset.record(i)
            boxes = record.boxes[~record.crowd]
            view = views.draw(CROPS, dataset.uid, record.image_id, record.width, record.height, boxes, k)
            assert read.view(i, k) == view
            assert torch.equal(views.render(image, read.view(i, k)), views.render(image, view))


def test_stored_views_are_only_read_back_never_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _packed(tmp_path)
    table = views.ViewTable.open_or_draw(dataset, CROPS)
    monkeypatch.setattr(views, "draw", None)
    assert views.ViewTable.open_or_draw(dataset, CROPS).uid == table.uid
    assert views.ViewTable.open_or_draw(dataset, replace(CROPS, photometric="student_only")).uid == table.uid
    with pytest.raises(TypeError):
        views.ViewTable.open_or_draw(dataset, replace(CROPS, flip=0.1))


def test_canvas_ids_are_those_of_the_views(tmp_path: Path) -> None:
    table = views.ViewTable.open_or_draw(_packed(tmp_path), CROPS)
    k_per_image = np.arange(len(table)) % 3
    expected = [table.buckets.index(table.view(i, int(k)).canvas) for i, k in enumerate(k_per_image)]
    assert table.canvas_ids(k_per_image).tolist() == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_table_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    dataset = _packed(tmp_path)
    views.ViewTable.open_or_draw(dataset, CROPS)
    path = next(tmp_path.glob("views-*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:900]), "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"{path.name}.*delete it"):
        views.ViewTable.open_or_draw(dataset, CROPS)


def test_a_table_of_other_shards_is_refused(tmp_path: Path) -> None:
    first, second = _packed(tmp_path / "a"), _packed(tmp_path / "b", count=13)
    views.ViewTable.open_or_draw(first, CROPS)
    path = next(first.folder.glob("views-*.arrow"))
    path.rename(second.folder / path.name)
    with pytest.raises(ValueError, match="holds views of data set"):
        views.ViewTable.open_or_draw(second, CROPS)


def test_a_view_of_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match="drawn for another image"):
        views.render(_image(10, 10), _draw(PLAIN, 20, 20))
