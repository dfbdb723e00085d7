"""The desk alone: what runs next, in which order, and that a new driver goes on where the old one was killed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuning import space as spaces
from tuning.conclusion import conclude
from tuning.desk import DONE, WAIT, Desk
from tuning.options import SearchConfig
from tuning.plan import Plan
from tuning.searchers import Grid, Random
from tuning.stopping import Asha, Never, Stopping
from tuning.timing import Timing
from tuning.trial_run import Curve, ended
from tuning.trial_store import store_of
from tuning.trials import Found, Objective, Point, Search, Trial

BEST = Objective(name="AP_small")
STEPS = 300
KEYS = "keys: {optim.lr: {uniform: [0.0, 1.0]}}"


def plan(folder: Path, **options: Any) -> Plan:
    path = folder / "own.yaml"
    path.write_text(KEYS)
    space, _ = spaces.load(path, {})
    made = SearchConfig(**({"trials": 3, "best": 1, "seeds": 2} | options))
    return Plan(
        name="own", recipe="own", storage=str(folder), space=space, options=made, tree={"seed": 4},
        trials=made.trials or 3, timing=Timing(steps=STEPS, grace=0),
    )  # fmt: skip


def driver(of: Plan, at_once: int = 1, stopping: Stopping | None = None) -> Desk:
    """As a process that has just started."""
    store = store_of(of.folder)
    if not store.exists():
        search = Search(
            name="own", recipe="own", space="own", keys={}, objectives=(BEST,), searcher="random", stopping="none",
            trials=of.trials, steps=STEPS,
        )  # fmt: skip
        store.write(Found(search=search))
    return Desk(
        plan=of,
        store=store,
        searcher=Random(space=of.space),
        stopping=stopping or Never(),
        at_once=at_once,
        changed=lambda found: None,
    )


def at(step: int, value: float) -> Point:
    return Point(step=step, values={"AP_small": value}, seconds=step / 10)


def end(desk: Desk, trial: Trial, value: float) -> None:
    desk.finished(trial.number, at(STEPS, value), {"AP_small": value}, 1.0, f"run{trial.number}")


def started(desk: Desk) -> Trial:
    trial = desk.next()
    assert isinstance(trial, Trial)
    return trial


def play(desk: Desk, value: Callable[[Trial], float]) -> list[Trial]:
    """To the end of the search, one trial after another."""
    played: list[Trial] = []
    while isinstance(trial := desk.next(), Trial):
        played.append(trial)
        end(desk, trial, value(trial))
    assert trial == DONE
    return played


def level(trial: Trial) -> float:
    return 10.0 if trial.role == "plain" else 10 * trial.settings["optim.lr"]


def test_trials_then_the_plain_student_and_the_best_again_seed_by_seed(tmp_path: Path) -> None:
    desk = driver(plan(tmp_path, seeds=3))
    played = play(desk, level)
    best = max(played[:3], key=level)
    expected = [("search", 4)] * 3 + [("plain", 4), ("plain", 5), ("again", 5), ("plain", 6), ("again", 6)]
    assert [(t.role, t.seed) for t in played] == expected
    assert {t.of for t in played if t.role == "again"} == {best.number}
    assert all(t.changes == best.changes for t in played if t.role == "again")
    assert len({t.run for t in played}) == len(played)


def test_one_seed_means_no_second_look(tmp_path: Path) -> None:
    assert [t.role for t in play(driver(plan(tmp_path, seeds=1)), level)] == ["search"] * 3


def test_no_more_trials_than_places(tmp_path: Path) -> None:
    desk = driver(plan(tmp_path), at_once=2)
    first, second = started(desk), started(desk)
    assert desk.next() == WAIT
    end(desk, first, 1.0)
    third = started(desk)
    # The best are known only when all have ended.
    end(desk, third, 1.0)
    assert desk.next() == WAIT
    end(desk, second, 2.0)
    assert started(desk).role == "plain"


@pytest.mark.parametrize("kill_after", range(7))
def test_a_search_killed_anywhere_does_what_it_would_have_done_and_nothing_twice(
    tmp_path: Path, kill_after: int
) -> None:
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
    whole = play(driver(plan(tmp_path / "whole")), level)
    desk, before = driver(plan(tmp_path / "killed")), []
    for _ in range(min(kill_after, len(whole))):
        before.append(started(desk))
        end(desk, before[-1], level(before[-1]))
    if kill_after < len(whole):
        running = started(desk)  # and the driver is killed
        desk.heard(running.number, at(100, 1.0))
    desk = driver(plan(tmp_path / "killed"))
    after = play(desk, level)
    assert [(t.run, t.settings, t.seed) for t in before + after] == [(t.run, t.settings, t.seed) for t in whole]
    found = desk.found.trials
    assert [t.starts for t in found] == [2 if t.number == kill_after else 1 for t in found]
    assert [(t.run, t.curve[-1]) for t in found] == [
        (t.run, t.curve[-1]) for t in store_of(tmp_path / "whole/own_search").read().trials
    ]


def test_points_are_kept_once_however_often_they_are_told(tmp_path: Path) -> None:
    desk = driver(plan(tmp_path))
    trial = started(desk)
    for _ in range(2):
        desk.heard(trial.number, at(100, 1.0))
        desk.heard(trial.number, at(200, 2.0))
    assert desk.found.trials[0].curve == (at(100, 1.0), at(200, 2.0))
    end(desk, trial, 3.0)
    desk.gone(trial.number)
    assert desk.found.trials[0].curve == (at(100, 1.0), at(200, 2.0), at(STEPS, 3.0))


def test_a_stopped_trial_stays_stopped(tmp_path: Path) -> None:
    rule = Asha(objective=BEST, rungs=(100,), keep=2)
    desk = driver(plan(tmp_path), stopping=rule)
    good = started(desk)
    desk.heard(good.number, at(100, 9.0))
    end(desk, good, 9.0)
    bad = started(desk)
    assert desk.heard(bad.number, at(100, 1.0)) is not None
    # What it still tells before its process ends changes nothing, and a new driver does not take it up.
    assert desk.heard(bad.number, at(200, 99.0)) is not None
    end(desk, bad, 99.0)
    stopped = driver(plan(tmp_path)).found.trials[1]
    assert (stopped.state, stopped.curve) == ("stopped", (at(100, 1.0),))
    assert started(driver(plan(tmp_path))).number == 2


def test_the_second_look_is_never_stopped(tmp_path: Path) -> None:
    rule = Asha(objective=BEST, rungs=(100,), keep=2)
    desk = driver(plan(tmp_path), stopping=rule)
    for _ in range(3):
        trial = started(desk)
        desk.heard(trial.number, at(100, 1.0))
        end(desk, trial, 1.0)
    plain = started(desk)
    assert plain.role == "plain"
    assert desk.heard(plain.number, at(100, 0.0)) is None


def test_a_refused_trial_is_not_tried_again_and_a_broken_one_is(tmp_path: Path) -> None:
    desk = driver(plan(tmp_path))
    refused, broken = started(desk).number, None
    desk.refused(refused, "loss is not finite")
    desk.gone(refused)
    broken = started(desk).number
    desk.gone(broken, "out of memory")
    assert [t.number for t in desk.broken] == [broken]
    again = driver(plan(tmp_path))
    assert again.found.trials[refused].state == "failed"
    assert started(again).number == broken


def test_a_grid_ends_with_its_points(tmp_path: Path) -> None:
    of = plan(tmp_path, seeds=1, trials=9)
    path = tmp_path / "own.yaml"
    path.write_text("keys: {optim.lr: {choice: [0.1, 0.2]}}")
    of = replace(of, space=spaces.load(path, {})[0])
    desk = driver(of)
    desk.searcher = Grid(space=of.space)
    assert [t.settings["optim.lr"] for t in play(desk, level)] == [0.1, 0.2]


def answer(tmp_path: Path, gain: Callable[[Trial], float]) -> Any:
    desk = driver(plan(tmp_path, seeds=3))
    play(desk, lambda t: 10.0 + 0.1 * t.seed + (0 if t.role == "plain" else gain(t)))
    return conclude(desk.found, desk.contenders(desk.found.of_role("search")))


def test_a_gain_on_every_seed_wins(tmp_path: Path) -> None:
    found = answer(tmp_path, lambda t: 2.0 + 0.01 * t.number)
    assert found.beats_plain
    assert found.contenders[0].verdict == "better"
    assert found.contenders[0].seeds == (4, 5, 6)
    assert "better than the plain student" in found.sentence


def test_it_says_so_when_nothing_beats_the_noise(tmp_path: Path) -> None:
    found = answer(tmp_path, lambda t: {4: 3.0, 5: -2.0, 6: 0.5}[t.seed])
    assert not found.beats_plain
    assert "nothing here beats the noise between seeds" in found.sentence


def test_a_curve_is_read_from_a_growing_file_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curve = Curve(path, ("AP", "AP_small"), "processor")
    assert list(curve.news()) == []

    def line(step: int, **values: float) -> str:
        return json.dumps({"t": 0, "s": step, "m": {key.replace("__", "/"): v for key, v in values.items()}}) + "\n"

    path.write_text(line(0, time__cpu_s=2.0) + line(1, time__cpu_s=3.0) + line(2, val__AP=5.0, val__AP_small=-1.0))
    assert list(curve.news()) == [{"step": 2, "values": {"AP": 5.0}, "seconds": 5.0}]
    torn = line(4, val__AP=6.0)
    with path.open("a") as file:
        file.write(line(2, time__cpu_s=1.0) + torn[:9])
    assert list(curve.news()) == []
    with path.open("a") as file:
        file.write(torn[9:])
    assert list(curve.news()) == [{"step": 4, "values": {"AP": 6.0}, "seconds": 6.0}]


def test_what_is_kept_of_a_result_has_no_number_that_was_not_measured() -> None:
    metrics = {"AP": 5.0, "AP_small": -1.0}
    result = {"metrics": metrics, "ms_per_image": 3, "memory_bytes": None, "minutes": 1, "run_id": "r"}
    kept = ended(result, 9.0, 300, ["AP_small", "ms_per_image"])
    assert kept["last"] == {"step": 300, "values": {"ms_per_image": 3.0}, "seconds": 9.0}
    assert kept["facts"] == {"AP": 5.0, "ms_per_image": 3.0}


def test_the_plain_student_has_no_teacher(tmp_path: Path) -> None:
    tree = {"name": "own", "teachers": [{"weights": "t"}], "distill": {"mkd": {}}, "seed": 3}
    made = replace(plan(tmp_path), tree=tree).plain_recipe("own_plain_seed5", 5)
    assert made == {"name": "own_plain_seed5", "teachers": [], "distill": {}, "seed": 5}


def gated(folder: Path, **options: Any) -> Plan:
    """Two keys: `lr` acts before the gate, `weight` after it alone."""
    path = folder / "further.yaml"
    path.write_text("keys: {optim.lr: {choice: [0.1, 0.2]}, distill.mkd.weight: {choice: [0.0, 1.0, 2.0]}}")
    made = replace(plan(folder, **({"seeds": 1, "trials": 6} | options)), space=spaces.load(path, {})[0])
    return replace(made, timing=replace(made.timing, late=frozenset({"distill.mkd.weight"}), gate=100))


def rest(desk: Desk, trial: Trial) -> None:
    desk.rested(trial.number, Point(step=100, values={}, seconds=7.0), f"checkpoints/{trial.number}", "run")


def forked(desk: Desk) -> list[Trial]:
    desk.searcher = Grid(space=desk.plan.space)
    played: list[Trial] = []
    while isinstance(trial := desk.next(), Trial):
        played.append(trial)
        if trial.role == "warmup":
            rest(desk, trial)
        else:
            end(desk, trial, 1.0)
    return played


def test_trials_that_differ_after_the_gate_begin_from_one_checkpoint(tmp_path: Path) -> None:
    """A weight of 0 leaves modules out: such a trial is not alike before the gate either."""
    played = forked(driver(gated(tmp_path)))
    told = [(t.role, t.origin, t.settings["optim.lr"], t.settings["distill.mkd.weight"]) for t in played]
    assert told == [
        ("warmup", None, 0.1, 0.0),
        ("search", 0, 0.1, 0.0),
        ("warmup", None, 0.1, 1.0),
        ("search", 2, 0.1, 1.0),
        ("search", 2, 0.1, 2.0),
        ("warmup", None, 0.2, 0.0),
        ("search", 5, 0.2, 0.0),
        ("warmup", None, 0.2, 1.0),
        ("search", 7, 0.2, 1.0),
        ("search", 7, 0.2, 2.0),
    ]
    assert {t.until for t in played if t.role == "warmup"} == {100}
    assert {t.until for t in played if t.role == "search"} == {None}


def test_a_trial_waits_for_its_warmup_and_does_without_one_that_failed(tmp_path: Path) -> None:
    desk = driver(gated(tmp_path), at_once=2)
    desk.searcher = Grid(space=desk.plan.space)
    warm = started(desk)
    assert desk.next() == WAIT
    desk.refused(warm.number, "loss is not finite")
    trial = started(desk)
    assert (trial.role, trial.origin) == ("search", None)


def test_a_warmup_that_was_killed_is_continued_not_done_again(tmp_path: Path) -> None:
    desk = driver(gated(tmp_path))
    first = started(desk)
    again = started(driver(gated(tmp_path)))
    assert (again.run, again.role, again.starts) == (first.run, "warmup", 2)


def test_what_the_warmup_cost_counts_for_its_trials(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"t": 0, "s": 100, "m": {"time/cpu_s": 2.0}}, {"t": 0, "s": 101, "m": {"val/AP": 1}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert next(Curve(path, ("AP",), "processor", before=7.0).news())["seconds"] == 9.0


def test_a_trial_that_its_driver_begins_again_is_counted_and_still_runs(tmp_path: Path) -> None:
    desk = driver(plan(tmp_path))
    trial = started(desk)
    desk.restarted(trial.number)
    assert (desk.store.read().trials[0].starts, desk.store.read().trials[0].state) == (2, "running")
    assert desk.next() == WAIT
    end(desk, trial, 1.0)
    desk.restarted(trial.number)
    assert desk.store.read().trials[0].starts == 2
