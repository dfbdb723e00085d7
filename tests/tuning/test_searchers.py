"""Searchers and stopping rules are functions of trials: the same trials give the same answer, whoever asks and when."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuning import space as spaces
from tuning.searchers import Grid, Random, Searcher, Tpe
from tuning.space import Space
from tuning.stopping import Asha, Never
from tuning.trials import Objective, Point, State, Trial

BEST = Objective(name="AP_small")
FAST = Objective(name="ms_per_image", goal="min")
TEXT = """
keys:
  optim.lr: {loguniform: [1e-4, 1.0]}
  optim.optimizer: {choice: [sgd, adamw]}
  optim.momentum: {uniform: [0.0, 0.9], when: {optim.optimizer: sgd}}
  optim.accumulate: {int: [1, 4]}
"""


@pytest.fixture
def space(tmp_path: Path) -> Space:
    path = tmp_path / "own.yaml"
    path.write_text(TEXT)
    return spaces.load(path, {})[0]


def trial(number: int, settings: dict[str, Any], state: State = "finished", **values: float) -> Trial:
    curve = (Point(step=100, values=values, seconds=1.0),) if values else ()
    return Trial(
        number=number, role="search", settings=settings, changes=settings, seed=0, run="r", state=state, curve=curve
    )


def played(searcher: Searcher, score: Any, count: int) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(count):
        settings = searcher.suggest(trials)
        assert settings is not None
        trials.append(trial(number, settings, **score(settings)))
    return trials


def all_of(space: Space) -> tuple[Searcher, ...]:
    return (Random(space=space), Tpe(space=space, objectives=(BEST,)), Tpe(space=space, objectives=(BEST, FAST)))


@pytest.mark.parametrize("which", range(3))
def test_every_draw_lies_in_the_space_and_keeps_its_conditions(space: Space, which: int) -> None:
    found = played(all_of(space)[which], lambda s: {"AP_small": s["optim.lr"], "ms_per_image": 3.0}, 20)
    for settings in (t.settings for t in found):
        assert 1e-4 <= settings["optim.lr"] <= 1
        assert settings["optim.accumulate"] in (1, 2, 3, 4)
        assert ("optim.momentum" in settings) == (settings["optim.optimizer"] == "sgd")
    assert len({t.settings["optim.lr"] for t in found}) == 20


@pytest.mark.parametrize("which", range(3))
def test_a_searcher_that_was_killed_draws_what_it_would_have_drawn(space: Space, which: int) -> None:
    def score(settings: dict[str, Any]) -> dict[str, float]:
        return {"AP_small": -settings["optim.lr"], "ms_per_image": settings["optim.accumulate"]}

    found = played(all_of(space)[which], score, 14)
    for count in (0, 5, 13):
        assert all_of(space)[which].suggest(found[:count]) == found[count].settings


def test_tpe_learns_and_random_does_not(space: Space) -> None:
    """The best learning rate is 0.01: what TPE draws late lies near it."""

    def far(settings: dict[str, Any]) -> float:
        import math

        return abs(math.log10(settings["optim.lr"] / 0.01))

    def late(searcher: Searcher) -> float:
        found = played(searcher, lambda s: {"AP_small": -far(s)}, 40)
        return sum(far(t.settings) for t in found[20:]) / 20

    assert late(Tpe(space=space, objectives=(BEST,))) < 0.6 * late(Random(space=space))


def test_tpe_knows_running_and_stopped_trials_and_leaves_out_failed_ones(space: Space) -> None:
    """Failed trials change no draw; ten that run, or were stopped, where the best one is change some."""
    found = played(Random(space=space), lambda s: {"AP_small": s["optim.lr"]}, 12)
    best = max(found, key=lambda t: t.settings["optim.lr"])

    def drawn(state: State, curve: tuple[Point, ...]) -> list[Any]:
        # As many trials each time, so that the draws are of the same seeds.
        ten = [replace(best, number=12 + i, state=state, curve=curve) for i in range(10)]
        return [Tpe(space=space, objectives=(BEST,), seed=s, startup=4).suggest([*found, *ten]) for s in range(8)]

    failed = drawn("failed", ())
    assert failed == drawn("failed", best.curve)
    assert failed != drawn("running", ())
    assert failed != drawn("stopped", best.curve)


def test_a_grid_is_gone_through_once(space: Space, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("keys: {optim.accumulate: {int: [1, 3]}, optim.optimizer: {choice: [sgd, adamw]}}")
    searcher = Grid(space=spaces.load(path, {})[0])
    trials: list[Trial] = []
    while (settings := searcher.suggest(trials)) is not None:
        trials.append(trial(len(trials), settings))
    assert [tuple(t.settings.values()) for t in trials] == [(a, o) for a in (1, 2, 3) for o in ("sgd", "adamw")]


def at(number: int, **values: float) -> Trial:
    """Evaluated at steps s100, s300, ...: AP_small."""
    curve = tuple(Point(step=int(s[1:]), values={"AP_small": v}, seconds=1.0) for s, v in values.items())
    return replace(trial(number, {}, "running"), curve=curve)


RULE = Asha(objective=BEST, rungs=(100, 300), keep=2)


def asked(rule: Asha, mine: Trial, others: Sequence[Trial]) -> str | None:
    return rule.why_stop(mine, [*others, mine])


def test_asha_stops_who_is_not_among_the_best_that_came_there() -> None:
    first, good, bad = at(0, s100=5.0), at(1, s100=7.0), at(2, s100=6.0)
    assert asked(RULE, first, []) is None
    assert asked(RULE, good, [first]) is None
    assert asked(RULE, bad, [first, good]) == "2. of 3 at step 100, where the best 1 went on"


def test_asha_looks_at_its_rungs_alone_and_at_those_who_came_there() -> None:
    slow, ahead = at(0, s100=9.0, s200=1.0), at(1, s100=8.0, s300=2.0)
    assert asked(RULE, slow, [ahead]) is None
    assert asked(RULE, ahead, [slow]) is None


def test_asha_minds_the_goal() -> None:
    rule = Asha(objective=Objective(name="AP_small", goal="min"), rungs=(100,), keep=2)
    assert asked(rule, at(1, s100=2.0), [at(0, s100=1.0)]) is not None
    assert asked(rule, at(1, s100=1.0), [at(0, s100=2.0)]) is None


def test_never_stops() -> None:
    assert Never().why_stop(at(0, s100=0.0), [at(1, s100=9.0)]) is None
