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
LANES = st.sampled_from([(1, 1), (4, 2), (6, 3), (8, 8), (12, 4), (16, 16)])
"""(global batch, lanes)."""


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


@given(SETS, BATCHES.map(lambda batch: (batch, 1)) | LANES, st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_an_epoch_shows_every_image_and_one_canvas_per_batch(
    images: tuple[np.ndarray, np.ndarray], batch_and_lanes: tuple[int, int], epoch: int, window: int
) -> None:
    (groups, canvases), (batch, lanes) = images, batch_and_lanes
    order = Order(groups, of(canvases), seed=3, batch=batch, window=window, lanes=lanes)
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


@given(SETS, LANES, st.integers(0, 30), st.lists(st.integers(1, 16), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_ranks_together_see_the_same_sequence_though_their_number_changes_at_every_step(
    images: tuple[np.ndarray, np.ndarray], batch_and_lanes: tuple[int, int], first: int, ranks: list[int]
) -> None:
    """A run that stops and goes on with other ranks needs the number of its step and nothing else."""
    (groups, canvases), (batch, lanes) = images, batch_and_lanes

    def resumed() -> Order:
        return Order(groups, of(canvases), seed=5, batch=batch, lanes=lanes)

    undisturbed = resumed()
    for step, size in enumerate((min(r, batch) for r in ranks), first):
        order = resumed()
        _, row = order.global_batch(step)
        parts = [order.rank_rows(row, World(rank=r, size=size)) for r in range(size)]
        assert np.concatenate(parts).tolist() == undisturbed.global_batch(step)[1].tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("batch", "lanes"), [(13, 1), (12, 4)])
def test_every_number_of_ranks_up_to_the_batch_sees_the_same_sequence(batch: int, lanes: int) -> None:
    """Also those that cannot share a batch evenly: their parts differ by one image, and none is empty."""
    groups, canvases = np.arange(150) // 11, np.arange(150) % 3
    order = Order(groups, of(canvases), seed=2, batch=batch, lanes=lanes)
    sequence = [order.global_batch(step)[1] for step in range(2 * order.steps_in(0))]
    for size in range(1, batch + 1):
        for row in sequence:
            parts = [order.rank_rows(row, World(rank=r, size=size)) for r in range(size)]
            assert np.concatenate(parts).tolist() == row.tolist()
            assert {len(part) for part in parts} <= {batch // size, -(-batch // size)}


@pytest.mark.parametrize("canvases", [1, 3])
@pytest.mark.parametrize(("ranks", "lanes"), [(2, 16), (4, 16), (8, 8), (16, 16)])
def test_with_lanes_a_rank_reads_its_own_part_of_the_shards(ranks: int, lanes: int, canvases: int) -> None:
    """Without, nearly all. Shared are the windows in which one rank's last lane ends and the next one's begins."""
    groups = np.arange(24_000) // 24
    of_image = np.random.Generator(np.random.Philox(2)).integers(0, canvases, len(groups))

    def read(lanes: int) -> list[int]:
        order = Order(groups, lambda _: of_image, seed=1, batch=32, window=4, lanes=lanes)
        each = [order.epoch(0)[:, 32 * r // ranks : 32 * (r + 1) // ranks] for r in range(ranks)]
        return [len(np.unique(groups[rows])) for rows in each]

    shards, at_the_ends = 1000, 2 * 4 * canvases
    assert max(read(lanes)) <= shards / ranks * 1.05 + at_the_ends
    assert min(read(1)) > min(0.75, 2 / ranks) * shards


def test_a_lane_shuffles_as_the_line_does() -> None:
    """Lanes cut the line, they do not draw anew: lane after lane it is the order without them."""
    groups = np.arange(960) // 8
    plain, laned = (Order(groups, lambda _: groups * 0, seed=4, batch=12, lanes=n).epoch(0) for n in (1, 4))
    assert laned.reshape(80, 4, 3).swapaxes(0, 1).ravel().tolist() == plain.ravel().tolist()


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
    with pytest.raises(ValueError, match="3 lanes do not divide 8"):
        Order(np.arange(3), of(np.arange(3)), seed=0, batch=8, lanes=3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Order(np.arange(3), of(np.arange(3)), seed=0, batch=1).position(-1)


@pytest.mark.parametrize("views", [1, 2, 3, 10])
def test_every_view_comes_once_in_as_many_epochs_and_a_shard_has_one_view_per_epoch(views: int) -> None:
    groups = np.arange(300) // 7
    seen = np.stack([view_of(groups, epoch, views) for epoch in range(5, 5 + views)])
    assert (np.sort(seen, 0) == np.arange(views)[:, None]).all()
    assert all(len(set(seen[0][groups == g].tolist())) == 1 for g in np.unique(groups))
    assert len(np.unique(seen[0])) == views, "groups should not all start at the same view"
