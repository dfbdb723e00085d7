import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.order import Order, view_of
from data_sharding.world import World

SETS = st.integers(1, 120).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 6), min_size=n, max_size=n).map(np.array),
        st.lists(st.integers(0, 3), min_size=n, max_size=n).map(np.array),
    )
)
BATCHES = st.integers(1, 17)


def of(canvases: np.ndarray) -> Callable[[int], np.ndarray]:
    """Canvases that change with the epoch, as they do when views differ in shape."""
    return lambda epoch: np.roll(canvases, epoch)


def test_a_set_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="without images"):
        Order(np.zeros(0, int), of(np.zeros(0, int)), seed=0, batch=4)


def test_one_image_fills_a_global_batch_by_itself() -> None:
    order = Order(np.array([7]), of(np.array([2])), seed=0, batch=4)
    assert order.epoch(0).tolist() == [[0, 0, 0, 0]]
    assert order.position(5) == (5, 0)


@given(SETS, BATCHES, st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_every_image_and_one_canvas_per_batch(
    images: tuple[np.ndarray, np.ndarray], batch: int, epoch: int, window: int
) -> None:
    groups, canvases = images
    order = Order(groups, of(canvases), seed=3, batch=batch, window=window)
    rows, now = order.epoch(epoch), np.roll(canvases, epoch)
    assert rows.shape == (order.steps_in(epoch), batch)
    assert set(rows.ravel().tolist()) == set(range(len(groups)))
    assert all(len(set(now[row].tolist())) == 1 for row in rows)
    for canvas in np.unique(now):
        members = np.sort(rows[now[rows[:, 0]] == canvas].ravel())
        shown = np.bincount(members, minlength=len(groups))[now == canvas]
        assert shown.max() - shown.min() <= 1
        assert len(members) == -(-int((now == canvas).sum()) // batch) * batch


@given(SETS, BATCHES)
@settings(max_examples=30, deadline=None)
def test_a_short_last_batch_is_completed_from_the_start_of_its_canvas(
    images: tuple[np.ndarray, np.ndarray], batch: int
) -> None:
    groups, canvases = images
    rows = Order(groups, of(canvases), seed=1, batch=batch).epoch(0)
    for canvas in np.unique(canvases):
        line = rows[canvases[rows[:, 0]] == canvas].ravel()
        count = int((canvases == canvas).sum())
        assert line[count:].tolist() == np.resize(line[:count], len(line))[count:].tolist()


@given(SETS, BATCHES, st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_a_step_alone_says_where_a_run_stands(images: tuple[np.ndarray, np.ndarray], batch: int, step: int) -> None:
    groups, canvases = images
    line = []
    for epoch in range(step + 1):
        line += [(epoch, row) for row in range(Order(groups, of(canvases), seed=1, batch=batch).steps_in(epoch))]
    order = Order(groups, of(canvases), seed=1, batch=batch)
    epoch, row = order.position(step)
    assert (epoch, row) == line[step]
    assert order.step_of(epoch) + row == step
    assert order.global_batch(step)[1].tolist() == order.epoch(epoch)[row].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_ranks_together_see_the_same_sequence_whatever_their_number(ranks: int) -> None:
    order = Order(np.arange(100) // 9, of(np.arange(100) % 3), seed=5, batch=16)
    for step in range(order.steps_in(0) + 3):
        _, row = order.global_batch(step)
        parts = [order.rank_rows(row, World(rank=r, size=ranks)) for r in range(ranks)]
        assert np.concatenate(parts).tolist() == row.tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    groups, canvases = np.arange(200) // 10, np.arange(200) % 2

    def plan(seed: int, epoch: int) -> list[list[int]]:
        return Order(groups, lambda _: canvases, seed=seed, batch=8).epoch(epoch).tolist()

    assert plan(1, 2) == plan(1, 2)
    plans = [plan(1, 2), plan(2, 1), plan(1, 3), plan(2, 2)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_this_order_stays_the_same_in_every_version() -> None:
    order = Order(np.arange(12) // 3, of(np.arange(12) % 2), seed=0, batch=3)
    assert order.epoch(0).tolist() == [[4, 6, 8], [10, 0, 2], [9, 11, 3], [7, 1, 5]]


def test_a_batch_reads_few_shards_and_canvases_take_turns() -> None:
    groups, canvases = np.arange(4000) // 20, np.arange(4000) % 2
    order = Order(groups, lambda _: canvases, seed=0, batch=16, window=4)
    rows = order.epoch(0)
    # A batch of one canvas out of two spans 32 samples of a window of 80: one window, seldom two.
    assert max(len(np.unique(groups[row])) for row in rows) <= 8
    turns = canvases[rows[:, 0]]
    assert 0.3 < np.mean(turns[1:] != turns[:-1]) < 0.7


def test_wrong_canvas_ids_and_settings_are_errors() -> None:
    with pytest.raises(ValueError, match=r"epoch 0: expected 3 canvas ids, got shape \(2,\)"):
        Order(np.arange(3), lambda _: np.zeros(2, int), seed=0, batch=2).epoch(0)
    with pytest.raises(ValueError, match="at least 1, got 0 and 16"):
        Order(np.arange(3), of(np.arange(3)), seed=0, batch=0)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Order(np.arange(3), of(np.arange(3)), seed=0, batch=1).position(-1)


@pytest.mark.parametrize("views", [1, 2, 3, 10])
def test_every_view_comes_once_in_as_many_epochs_and_a_shard_has_one_view_per_epoch(views: int) -> None:
    groups = np.arange(300) // 7
    seen = np.stack([view_of(groups, epoch, views) for epoch in range(5, 5 + views)])
    assert (np.sort(seen, 0) == np.arange(views)[:, None]).all()
    assert all(len(set(seen[0][groups == g].tolist())) == 1 for g in np.unique(groups))
    assert len(np.unique(seen[0])) == views, "groups should not all start at the same view"


def test_coco_is_planned_in_milliseconds() -> None:
    groups = np.repeat(np.arange(4200), 29)[:118_287]
    canvases = np.random.Generator(np.random.Philox(1)).integers(0, 6, 118_287)
    order = Order(groups, lambda _: canvases, seed=1, batch=64)

    def seconds(epoch: int) -> float:
        began = time.perf_counter()
        order.epoch(epoch)
        return time.perf_counter() - began

    assert min(seconds(epoch) for epoch in range(5)) < 0.05
