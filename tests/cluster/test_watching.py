"""Every rank's time is told, and the rank that holds the others up is named. No test looks at a real clock."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.ranks.pace import Load, Pace
from cluster.ranks.slow import WINDOWS, SlowRanks
from cluster.ranks.traffic import Traffic
from cluster.ranks.watching import Watch
from cluster.recovery import incidents
from data_sharding.world import World
from tests.cluster.two_ranks import ranks

CPU = torch.device("cpu")


def load(own: float, *, data: float = 0.0, step: float = 10.0) -> Load:
    return Load(step=step, parts={}, data=data, communication=step - own, memory=0.0)


# ---- who is slow


def test_a_rank_that_needs_longer_by_itself_is_named_once_and_again_when_it_keeps_up() -> None:
    slow = SlowRanks(["a", "a", "b"])
    told = [slow.see(20 * i, [load(1.0), load(1.1), load(1.6)]) for i in range(1, WINDOWS + 3)]
    assert [len(lines) for lines in told] == [0] * (WINDOWS - 1) + [1, 0, 0]
    (line,) = told[WINDOWS - 1]
    assert line.startswith(
        f"step {20 * WINDOWS}: rank 2 on b holds the others up: 1.6 s of its own per step, the others"
    )
    assert "1.05 s (median)" in line
    assert "look at its processor or GPU" in line
    assert slow.see(140, [load(1.0), load(1.1), load(1.2)]) == [
        "step 140: rank 2 on b keeps up again: 1.2 s of its own per step, the others 1.05 s"
    ]


def test_one_of_two_ranks_is_found_though_both_steps_take_equally_long() -> None:
    slow = SlowRanks(["a", "b"])
    told = [slow.see(i, [load(3.0, step=3.0), load(2.0, step=3.0)]) for i in range(WINDOWS)]
    assert [[line.split(" holds")[0] for line in lines] for lines in told] == [[], [], ["step 2: rank 0 on a"]]


def test_a_rank_whose_data_come_late_is_told_apart() -> None:
    slow = SlowRanks(["a", "b"])
    told = [slow.see(i, [load(1.0), load(2.0, data=0.9)]) for i in range(WINDOWS)]
    assert "it waits 0.9 s for data, they 0 s: its data come late" in told[-1][0]


def test_a_hiccup_is_no_slow_rank() -> None:
    slow = SlowRanks(["a", "b"])
    for i in range(4 * WINDOWS):
        assert slow.see(i, [load(1.0), load(1.0 if i % WINDOWS == 0 else 5.0)]) == []


# ---- what ranks tell each other


def watched(world: World, folder: str, every: int, steps: int) -> list[dict[str, float]]:
    """Feed a rank's numbers; rank 1 needs three times as long by itself. On a rank."""
    watch = Watch(world, CPU, every, Path(folder))
    own = (1.0, 3.0)[world.rank]
    seconds = {"step": 4.0, "data": 0.5 * world.rank, "communication": 4.0 - own, "student": 2.0, "cpu": 9.0}
    return [watch.see(step, seconds | {"student": 2.0 + step}, 8) for step in range(steps)]


@pytest.mark.cluster
def test_all_ranks_are_told_at_the_end_of_each_window_and_a_slow_one_is_noted(tmp_path: Path) -> None:
    mine, its = ranks()(watched, str(tmp_path), 2, 2 * WINDOWS + 1)
    assert mine == its
    assert [bool(found) for found in mine] == [False, True] * WINDOWS + [False]
    assert mine[1]["ranks/own_s/0"] == 1.0
    assert mine[1]["ranks/own_s/1"] == 3.0
    assert mine[1]["ranks/communication_share/0"] == 0.75
    assert mine[1]["ranks/data_s/1"] == 0.5
    assert mine[1]["ranks/images_per_s/1"] == 1.0
    assert [mine[step]["ranks/student_s/0"] for step in (1, 3)] == [2.5, 4.5], "the mean over the window"
    assert mine[1]["ranks/memory_bytes/0"] > 1e6
    assert not any("cpu" in name for name in mine[1])
    (row,) = incidents.read(tmp_path)
    assert row["now"].startswith(f"step {2 * WINDOWS}: rank 1 on ")


def test_one_rank_alone_and_a_watch_that_is_off_tell_nothing(tmp_path: Path) -> None:
    assert watched(World(), str(tmp_path), 1, 3) == [{}] * 3
    pace = Pace(World(rank=0, size=2), CPU, 0)
    assert [pace.see(step, {"step": 1.0}, float) for step in range(3)] == [[]] * 3


# ---- time in collectives


class Calls:
    """Collectives that take as long as they are told, on a clock of their own."""

    def __init__(self) -> None:
        self.time = 0.0

    def all_reduce(self, seconds: float) -> None:
        self.time += seconds

    def all_gather(self, seconds: float) -> Any:
        def wait() -> str:
            self.time += seconds
            return "there"

        return SimpleNamespace(wait=wait, is_completed=lambda: False)


def test_collectives_count_with_what_their_callers_wait_for_later() -> None:
    calls = Calls()
    traffic = Traffic(CPU, now=lambda: calls.time, calls=calls)
    kept = SimpleNamespace(all_gather_function=calls.all_gather)
    with traffic.counted(kept):
        calls.all_reduce(2.0)
        calls.time += 100.0
        handle = kept.all_gather_function(3.0)
        calls.time += 100.0
        assert handle.wait() == "there"
        assert not handle.is_completed()
    calls.all_reduce(1000.0)
    kept.all_gather_function(1000.0).wait()
    assert traffic.read() == 5.0
    assert traffic.read() == 0.0
    assert kept.all_gather_function == calls.all_gather


def counted(world: World) -> tuple[float, float, float, bool]:
    """What torch's own functions are counted as; on a rank."""
    plain, traffic = dist.all_reduce, Traffic(CPU)
    with traffic.counted():
        total = world.sum(torch.ones(1))
        work = dist.all_reduce(torch.ones(1), async_op=True)
        assert work is not None
        work.wait()
    spent = traffic.read()
    world.sum(torch.ones(1))
    return float(total), spent, traffic.read(), dist.all_reduce is plain


@pytest.mark.cluster
def test_torchs_own_collectives_are_counted_inside_and_untouched_outside() -> None:
    for total, inside, outside, restored in ranks()(counted):
        assert total == 2.0
        assert inside > 0.0
        assert outside == 0.0
        assert restored
