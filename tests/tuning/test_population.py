"""A population: pieces of runs, the worst of which go on from the best; a function of what has ended."""

from dataclasses import replace
from pathlib import Path

from tests.tuning.test_desk import at, driver, plan, started
from tuning import space as spaces
from tuning.desk import DONE, WAIT, Desk
from tuning.plan import Plan
from tuning.population import FACTORS, Population
from tuning.trials import Objective, Trial

MEMBERS, ENDS = 4, (100, 200, 300)
LR, WEIGHT = "optim.lr", "distill.mkd.weight"


def population(folder: Path) -> Plan:
    path = folder / "further.yaml"
    path.write_text(f"keys: {{{LR}: {{uniform: [0.1, 1.0]}}, {WEIGHT}: {{choice: [1.0, 2.0, 4.0]}}}}")
    made = plan(folder, seeds=1)
    timed = replace(made.timing, ends=ENDS)
    return replace(made, space=spaces.load(path, {})[0], trials=MEMBERS * len(ENDS), timing=timed)


def desk(of: Plan) -> Desk:
    made = driver(of, at_once=MEMBERS)
    made.searcher = Population(space=of.space, objective=Objective(name="AP_small"), members=MEMBERS, ends=ENDS)
    return made


def value(trial: Trial) -> float:
    return 10 * trial.settings[LR]


def close(of: Desk, trial: Trial) -> None:
    """As a trial's process tells it: a point where it rests, then that it rests; or its end."""
    if trial.until is None:
        of.finished(trial.number, at(ENDS[-1], value(trial)), {}, 1.0, "run")
    else:
        of.heard(trial.number, at(trial.until, value(trial)))
        of.rested(trial.number, at(trial.until, 0.0), f"checkpoints/{trial.number}", "run")


def play(of: Desk) -> list[Trial]:
    played: list[Trial] = []
    while isinstance(trial := of.next(), Trial):
        played.append(trial)
        close(of, trial)
    assert trial == DONE
    return played


def test_the_worst_go_on_from_the_best_with_settings_a_little_changed(tmp_path: Path) -> None:
    played = play(desk(population(tmp_path)))
    assert len(played) == MEMBERS * len(ENDS)
    for generation in (1, 2):
        before = played[(generation - 1) * MEMBERS : generation * MEMBERS]
        best, worst = max(before, key=value), min(before, key=value)
        for member, piece in enumerate(played[generation * MEMBERS : (generation + 1) * MEMBERS]):
            if before[member] is not worst:
                assert (piece.origin, piece.settings) == (before[member].number, before[member].settings)
                continue
            assert piece.origin == best.number
            allowed = [min(max(best.settings[LR] * factor, 0.1), 1.0) for factor in FACTORS]
            assert piece.settings[LR] in allowed
    assert [trial.until for trial in played] == [100] * 4 + [200] * 4 + [None] * 4


def test_a_generation_waits_for_the_one_before(tmp_path: Path) -> None:
    of = desk(population(tmp_path))
    first = [started(of) for _ in range(MEMBERS)]
    assert of.next() == WAIT
    for trial in first[:-1]:
        close(of, trial)
    assert of.next() == WAIT
    close(of, first[-1])
    assert started(of).origin is not None


def test_a_population_that_was_killed_goes_on_as_it_would_have(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = play(desk(population(tmp_path / "whole")))
    of = desk(population(tmp_path / "killed"))
    for _ in range(5):
        close(of, started(of))
    running = started(of)  # and the driver is killed
    again = play(desk(population(tmp_path / "killed")))
    assert again[0].run == running.run
    assert [(t.run, t.settings, t.origin) for t in again] == [(t.run, t.settings, t.origin) for t in whole[5:]]


def test_a_member_that_failed_is_replaced(tmp_path: Path) -> None:
    of = desk(population(tmp_path))
    first = [started(of) for _ in range(MEMBERS)]
    of.refused(first[0].number, "loss is not finite")
    for trial in first[1:]:
        close(of, trial)
    assert started(of).origin == max(first[1:], key=value).number


def test_only_what_reached_the_end_can_win(tmp_path: Path) -> None:
    of = desk(population(tmp_path))
    play(of)
    assert all(trial.until is None for trial in of.contenders(of.found.of_role("search")))
