"""Replays of searches cost what can be worked out by hand, and searchers are the product's."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import search_cost, search_replay
from benchmarks.search_replay import Cost, Recorded
from cluster.grammar import ConfigError
from tuning import space as spaces
from tuning.searchers import Grid, Random
from tuning.stopping import Asha, Never
from tuning.trial_store import to_tree
from tuning.trials import Found, Objective, Point, Search, Trial

BEST = Objective(name="AP_small")


def recorded(place: int, *, blind: bool = False) -> Recorded:
    """The benchmark's grid: each trial has three evaluations, 100 s apart; the one at `place` ends at 20, the others at
    10. `blind`: until the end the best one is the worst."""
    space, wrong = spaces.load(search_cost.SPACE, {})
    assert not wrong
    trials = []
    for number, settings in enumerate(space.grid()):
        end = 20.0 if number == place else 10.0
        early = (1.0 if number == place else 5.0) if blind else end / 2
        curve = tuple(
            Point(step=step, values={"AP_small": value}, seconds=float(step))
            for step, value in ((100, early), (200, early), (300, end))
        )
        trials.append(
            Trial(number=number, role="search", settings=settings, changes=settings, seed=0, run=f"r{number}",
                  state="finished", curve=curve)
        )  # fmt: skip
    return Recorded(space=space, objective=BEST, trials=tuple(trials), rungs=(100,), keep=3)


@pytest.mark.parametrize("place", [0, 7, 23])
def test_a_grid_in_order_pays_for_all_before_it(place: int) -> None:
    grid = recorded(place)
    assert grid.whole == 24 * 300
    assert [grid.good(trial) for trial in grid.trials].count(True) == 1
    assert search_replay.replay(grid, Grid(space=grid.space), Never()) == 300 * (place + 1)


def test_asha_pays_for_a_stopped_trial_up_to_where_it_was_stopped() -> None:
    """Trial 0 goes on, being alone; 1 to 5 are each a little worse and stopped at 100 s; trial 6 is best."""
    grid = recorded(6)
    worse = [
        replace(t, curve=tuple(replace(p, values={"AP_small": p.values["AP_small"] - t.number / 10}) for p in t.curve))
        if t.number < 6 else t
        for t in grid.trials
    ]  # fmt: skip
    asha = Asha(objective=BEST, rungs=(100,), keep=3)
    assert search_replay.replay(replace(grid, trials=tuple(worse)), Grid(space=grid.space), asha) == 300 + 5 * 100 + 300


def test_who_is_stopped_is_not_found() -> None:
    grid = recorded(7, blind=True)
    asha = Asha(objective=BEST, rungs=grid.rungs, keep=3)
    assert math.isinf(search_replay.replay(grid, Grid(space=grid.space), asha))
    assert search_replay.replay(grid, Grid(space=grid.space), Never()) == 8 * 300


def test_random_draws_find_one_of_24_as_often_as_they_must() -> None:
    """A geometric distribution: half of the searches need at most 17 draws, nine in ten 55."""
    grid = recorded(11)
    made = {"random": lambda seed: (Random(space=grid.space, seed=seed), Never())}
    cost = search_replay.cost(grid, "random", made["random"], 120)
    assert 12 / 24 < cost.median < 23 / 24
    assert 1.6 < cost.most < 3.2


def test_a_grid_in_a_random_order_needs_half_of_itself() -> None:
    grid = recorded(11)
    cost = search_replay.cost(grid, "grid", search_replay.contestants(grid)["grid"], 60)
    assert set(cost.shares) <= {n / 24 for n in range(1, 25)}
    assert 0.3 < cost.median < 0.7


def test_every_contestant_is_the_products_and_the_same_each_time() -> None:
    grid = recorded(5)
    found = search_replay.contestants(grid)
    assert list(found) == ["grid", "grid + asha", "random", "random + asha", "tpe", "tpe + asha"]
    for name, make in found.items():
        assert {type(part).__module__ for part in make(0)} == {"tuning.searchers", "tuning.stopping"}
        assert search_replay.replay(grid, *make(3)) == search_replay.replay(grid, *make(3)), name


def test_the_median_and_nine_in_ten_count_what_was_never_found() -> None:
    cost = Cost(name="x", shares=(*(i / 10 for i in range(1, 9)), math.inf, math.inf))
    assert (cost.median, cost.most, cost.missed) == (pytest.approx(0.55), math.inf, 0.2)
    assert search_replay.share(cost.most) == "never"


def stored(path: Path, grid: Recorded, trials: int) -> None:
    search = Search(
        name="g", recipe="r", space="s", keys={}, objectives=(BEST,), searcher="grid", stopping="none", trials=24,
        steps=300,
    )  # fmt: skip
    found = to_tree(Found(search=search, trials=grid.trials[:trials]))
    search_cost.keep(path, search_cost.GRID, {"rungs": [100], "keep": 3, "found": found})


def test_results_are_replayed_as_they_were_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    stored(path, recorded(5), 24)
    content = json.loads(path.read_text())
    assert search_cost.recorded(content) == recorded(5)
    content[search_cost.REAL] = content[search_cost.GRID]
    search_cost.report(content, 2)
    told = capsys.readouterr().out
    assert "within 1% of the best (0.20 AP_small): 1 points" in told
    assert "near the best after 0.25 of the grid's training time; all of it cost 1.00" in told
    assert "part from the recorded ones by 0.00" in told


def test_a_grid_with_gaps_is_not_replayed(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    stored(path, recorded(5), 20)
    with pytest.raises(ConfigError, match="20 of 24 points are recorded"):
        search_cost.recorded(json.loads(path.read_text()))
