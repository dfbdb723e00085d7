import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding import assemble, images
from data_sharding.assemble import LoaderError
from data_sharding.batch import Batch
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheWriter
from data_sharding.loader import Loader, evaluation_batches, evaluation_plan, order_of
from data_sharding.order import Order
from data_sharding.record import Record
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable, place_labels, render
from data_sharding.world import World
from tests.data_sharding.tiny import tiny_key, tiny_taps, tiny_views


@pytest.fixture(scope="module")
def order(dataset: PackedDataset, views: ViewTable) -> Order:
    return order_of(dataset, views, seed=0, batch=4, window=2)


def equal(a: Batch, b: Batch) -> bool:
    def parts(x: Batch) -> list[torch.Tensor]:
        return [x.images, x.geometry.sizes, *x.boxes, *x.labels, *x.ignore, *x.scaled_images.values()]

    named = (a.image_ids, a.views, a.geometry.canvas) == (b.image_ids, b.views, b.geometry.canvas)
    return named and all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def steps(
    dataset: PackedDataset, views: ViewTable, order: Order, count: int, **settings: object
) -> list[tuple[Batch, ...]]:
    chosen = {"world": World(), "threads": 2, "prefetch": 2} | settings
    with Loader(dataset, views, order, **chosen) as loader:  # type: ignore[arg-type]
        return list(islice(loader, count))


def test_a_batch_holds_what_the_views_say(dataset: PackedDataset, views: ViewTable, order: Order) -> None:
    seen = set()
    for step, (batch,) in enumerate(steps(dataset, views, order, order.steps_in(0), factors=(2,))):
        positions = order.epoch(0)[step]
        assert batch.image_ids == tuple(dataset.image_ids[positions].tolist())
        assert batch.images.shape == (4, 3, *batch.geometry.canvas)
        for row, position in enumerate(positions.tolist()):
            record, view = dataset.record(position), views.view(position, batch.views[row])
            pixels = images.decode(record.image)
            assert torch.equal(batch.images[row], render(pixels, view))
            assert torch.equal(batch.scaled_images[2][row], render(pixels, view, 2))
            assert tuple(batch.geometry.sizes[row].tolist()) == view.size
            assert batch.scales is not None
            scale = [view.size[0] / view.crop[3], view.size[1] / view.crop[2]]
            assert batch.scales[row].tolist() == pytest.approx(scale)
            expected = place_labels(record, view, min_visible=views.config.min_visible)
            found = batch.boxes[row], batch.labels[row], batch.ignore[row]
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
            seen.add(len(found[0]))
        assert list(batch.scaled_images) == [2]
    assert {0, 1, 2} <= seen, "images without objects must be among them"


def test_each_epoch_shows_another_view_of_each_image(dataset: PackedDataset, views: ViewTable, order: Order) -> None:
    all_steps = steps(dataset, views, order, order.step_of(2))
    shown: list[dict[int, int]] = [{}, {}]
    for step, (batch,) in enumerate(all_steps):
        shown[order.position(step)[0]].update(zip(batch.image_ids, batch.views, strict=True))
    assert shown[0].keys() == shown[1].keys() == set(dataset.image_ids.tolist())
    assert all({shown[0][i], shown[1][i]} == {0, 1} for i in shown[0])


def test_random_draws_are_keyed_by_run_and_epoch(dataset: PackedDataset, views: ViewTable, order: Order) -> None:
    """On every rank and in every micro-batch alike; evaluation draws nothing."""
    steps_of_first = order.steps_in(0)
    for settings in ({}, {"world": World(rank=1, size=2)}, {"accumulate": 2}):
        found = steps(dataset, views, order, steps_of_first + 1, **settings)
        assert {batch.key for batches in found[:-1] for batch in batches} == {(0, 0)}
        assert {batch.key for batch in found[-1]} == {(0, 1)}


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 3)])
def test_batches_do_not_depend_on_threads(
    dataset: PackedDataset, views: ViewTable, order: Order, threads: int, prefetch: int
) -> None:
    expected = steps(dataset, views, order, 6)
    found = steps(dataset, views, order, 6, threads=threads, prefetch=prefetch)
    assert all(equal(a, b) for (a,), (b,) in zip(expected, found, strict=True))


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_accumulation_share_the_same_global_batch(
    dataset: PackedDataset, views: ViewTable, order: Order, ranks: int, accumulate: int
) -> None:
    whole = [batch for (batch,) in steps(dataset, views, order, 3)]
    worlds = [World(rank=r, size=ranks) for r in range(ranks)]
    parts = [steps(dataset, views, order, 3, world=w, accumulate=accumulate) for w in worlds]
    for step, batch in enumerate(whole):
        micro = [m for rank in parts for m in rank[step]]
        assert len(micro) == ranks * accumulate
        assert torch.equal(torch.cat([m.images for m in micro]), batch.images)
        assert sum((m.image_ids for m in micro), ()) == batch.image_ids


def test_a_loader_goes_on_where_one_of_another_number_of_ranks_stopped(
    dataset: PackedDataset, views: ViewTable
) -> None:
    """The same global batches, image by image and pixel by pixel, with the ranks changed at every step."""
    order = order_of(dataset, views, seed=0, batch=4, window=2, lanes=2)
    whole = [batch for (batch,) in steps(dataset, views, order, 6)]
    for step, ranks in enumerate([4, 1, 3, 2, 3, 1]):
        parts = [
            steps(dataset, views, order, 1, world=World(rank=r, size=ranks), start_step=step) for r in range(ranks)
        ]
        assert torch.equal(torch.cat([batch.images for ((batch,),) in parts]), whole[step].images)
        assert sum((batch.image_ids for ((batch,),) in parts), ()) == whole[step].image_ids


def test_a_batch_that_cannot_be_shared_is_refused(dataset: PackedDataset, views: ViewTable, order: Order) -> None:
    with pytest.raises(ValueError, match=r"batch of 4 images cannot be shared by 5 rank.* at least 5"):
        Loader(dataset, views, order, world=World(size=5))
    with pytest.raises(ValueError, match="must be at least 8"):
        Loader(dataset, views, order, world=World(size=2), accumulate=4)
    with pytest.raises(ValueError, match=r"above the student's, got \(1,\)"):
        Loader(dataset, views, order, world=World(), factors=(1,))


@pytest.mark.parametrize("start", [0, 1, 5, 11])
def test_a_loader_resumes_at_any_step(dataset: PackedDataset, views: ViewTable, order: Order, start: int) -> None:
    expected = steps(dataset, views, order, start + 2)[start:]
    with Loader(dataset, views, order, world=World(), start_step=start) as loader:
        assert loader.step == start
        found = list(islice(loader, 2))
        assert loader.step == start + 2
    assert all(equal(a, b) for (a,), (b,) in zip(expected, found, strict=True))


def test_only_the_students_colours_are_jittered_and_anew_in_every_epoch(dataset: PackedDataset, order: Order) -> None:
    clean_views = tiny_views(dataset)
    views = tiny_views(dataset, photometric="student_only", brightness=0.5)
    plain = steps(dataset, clean_views, order, order.step_of(3))
    found = steps(dataset, views, order, order.step_of(3))
    for (a,), (b,) in zip(plain, found, strict=True):
        assert torch.equal(a.images, b.scaled_images[1])
        assert not torch.equal(a.images, b.images)
    again = steps(dataset, views, order, 2, threads=1)
    assert all(equal(a, b) for (a,), (b,) in zip(again, found[:2], strict=True))

    def colours(epoch: int) -> dict[int, torch.Tensor]:
        first, last = order.step_of(epoch), order.step_of(epoch + 1)
        return {i: x for (b,) in found[first:last] for i, x in zip(b.image_ids, b.images, strict=True)}

    first, later = colours(0), colours(2)
    assert all(not torch.equal(first[i], later[i]) for i in first)


def test_cached_taps_are_those_of_the_images_in_the_batch(
    tmp_path: Path, dataset: PackedDataset, views: ViewTable, order: Order
) -> None:
    key = tiny_key(dataset, views, codecs=("fp32",) * 3)
    writer = CacheWriter(tmp_path, key, dataset, views)
    for shard in writer.pending():
        writer.fill(shard, tiny_taps(key, views))
    writer.finish()
    caches = {"big": TeacherCache.open(tmp_path, key)}
    for step, micro in enumerate(steps(dataset, views, order, 8, caches=caches, accumulate=2)):
        _, positions = order.global_batch(step)
        for batch, places in zip(micro, positions.reshape(2, 2), strict=True):
            for row, (position, view) in enumerate(zip(places.tolist(), batch.views, strict=True)):
                expected = tiny_taps(key, views)(np.array([position]), view)
                assert expected.c5 is not None
                found = batch.cached["big"].decode()
                assert found.c5 is not None
                torch.testing.assert_close(found.c5[row], expected.c5[0], rtol=0, atol=0)
                torch.testing.assert_close(found.pyramid[1][row], expected.pyramid[1][0], rtol=0, atol=0)
    other = tiny_views(dataset, count=1)
    with pytest.raises(ValueError, match="the cache of teacher 'big' holds"):
        Loader(dataset, other, order_of(dataset, other, seed=0, batch=4), world=World(), caches=caches)


def broken_after(monkeypatch: pytest.MonkeyPatch, image_id: int) -> None:
    real = PackedDataset.record

    def record(self: PackedDataset, position: int) -> Record:
        found = real(self, position)
        return Record(**(vars(found) | {"image": b"not an image"})) if found.image_id == image_id else found

    monkeypatch.setattr(PackedDataset, "record", record)


def test_a_broken_image_is_raised_in_the_consumer_with_its_name_and_the_threads_end(
    dataset: PackedDataset, views: ViewTable, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, (batch,) = 3, steps(dataset, views, order, 4)[3]
    broken_after(monkeypatch, batch.image_ids[1])
    before = sum(1 for _, (b,) in zip(range(step), steps_until_error(dataset, views, order), strict=False))
    assert before <= step
    loader = Loader(dataset, views, order, world=World())
    with pytest.raises(
        LoaderError, match=rf"images/{batch.image_ids[1] - 100:03d}.png \(image id {batch.image_ids[1]}\)"
    ):
        list(islice(loader, step + 1))
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    plain = tiny_views(dataset, count=1)
    with pytest.raises(LoaderError, match=f"image id {batch.image_ids[1]}"):
        list(evaluation_batches(dataset, plain, world=World(), batch=2))


def steps_until_error(dataset: PackedDataset, views: ViewTable, order: Order) -> list[tuple[Batch, ...]]:
    found = []
    with Loader(dataset, views, order, world=World()) as loader:
        try:
            for batches in loader:
                found.append(batches)
        except LoaderError:
            return found
    raise AssertionError("the loader never failed")


def test_work_ahead_is_bounded_and_waiting_is_counted(
    dataset: PackedDataset, views: ViewTable, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    go_on = threading.Event()

    def decode(data: bytes) -> torch.Tensor:
        decoded.append(1)
        assert go_on.wait(10)
        return real(data)

    real = images.decode
    monkeypatch.setattr(assemble.images, "decode", decode)
    with Loader(dataset, views, order, world=World(), prefetch=2, threads=3) as loader:
        timer = threading.Timer(0.2, go_on.set)
        timer.start()
        next(loader)
        assert loader.wait_seconds >= 0.15
        next(loader)
        next(loader)
    assert len(decoded) <= (3 + 2) * order.batch


def test_closing_early_ends_the_threads_and_may_be_done_twice(
    dataset: PackedDataset, views: ViewTable, order: Order
) -> None:
    loader = Loader(dataset, views, order, world=World(), prefetch=5)
    next(loader)
    loader.close()
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]
    batches = evaluation_batches(dataset, tiny_views(dataset, count=1), world=World(), batch=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("evaluation")]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_evaluation_sees_every_image_once_and_ranks_do_equal_work(ranks: int, batch: int, count: int) -> None:
    canvases, ids = np.arange(count) * 7 % 3, np.arange(count) + 1000
    plans = [evaluation_plan(canvases, ids, batch, World(rank=r, size=ranks)) for r in range(ranks)]
    assert len({len(p) for p in plans}) == 1
    real = [s for p in plans for b in p for s in b if s.image_id >= 0]
    assert sorted(s.image_id for s in real) == ids.tolist()
    assert all(s.image_id == ids[s.position] for s in real)
    for planned in (b for p in plans for b in p):
        assert len(planned) == batch
        assert len({int(canvases[s.position]) for s in planned}) == 1


@pytest.mark.parametrize("factor", [1, 2])
def test_evaluation_renders_the_plain_view_at_the_teachers_size(dataset: PackedDataset, factor: int) -> None:
    views = tiny_views(dataset, count=1)
    position_of = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
    found = set()
    for rank in range(2):
        for batch in evaluation_batches(dataset, views, world=World(rank=rank, size=2), batch=3, factor=factor):
            assert batch.scaled_images == {}
            for row, image_id in enumerate(batch.image_ids):
                if image_id < 0:
                    continue
                found.add(image_id)
                record, view = dataset.record(position_of[image_id]), views.view(position_of[image_id], 0)
                assert torch.equal(batch.images[row], render(images.decode(record.image), view, factor))
                assert batch.geometry.canvas == (view.canvas[0] * factor, view.canvas[1] * factor)
                assert batch.geometry.sizes[row].tolist() == [view.size[0] * factor, view.size[1] * factor]
                boxes, _, ignore = place_labels(record, view, min_visible=views.config.min_visible)
                assert torch.equal(batch.boxes[row], boxes * factor)
                assert torch.equal(batch.ignore[row], ignore * factor)
    assert found == set(position_of)
