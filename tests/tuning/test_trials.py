"""What a search has found is read back as it was written, and half a write never shows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.grammar import ConfigError
from tests.tuning.finished_search import finished
from tuning.trial_store import TrialStore, store_of
from tuning.trials import Found, Objective, Point, Trial, better


@pytest.mark.parametrize("latency", [False, True])
def test_a_search_is_read_as_it_was_written(tmp_path: Path, latency: bool) -> None:
    found = finished(latency=latency)
    store_of(tmp_path).write(found)
    assert store_of(tmp_path).read() == found


def test_the_example_holds_every_kind_of_trial() -> None:
    found = finished()
    assert {trial.state for trial in found.trials} == {"finished", "stopped", "failed"}
    assert {trial.role for trial in found.trials} == {"search", "again", "plain"}
    assert found.conclusion is not None
    assert [trial.number for trial in found.trials] == list(range(len(found.trials)))


def test_a_trial_is_added_and_replaced_by_its_number(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "search.json")
    store.write(Found(search=finished().search))
    first = finished().trials[0]
    store.put(first)
    changed = replace(first, state="stopped")
    assert store.put(changed).trials == (changed,)
    assert store.read().trials == (changed,)
    with pytest.raises(ValueError, match="trial 7 follows on 1"):
        store.put(replace(first, number=7))


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "search.json")
    store.write(finished())
    store.path.write_text(json.dumps(json.loads(store.path.read_text()) | {"version": 0}))
    with pytest.raises(ConfigError, match="version 0, this is 1"):
        store.read()


def test_better_knows_the_goal_and_leaves_out_what_has_no_value() -> None:
    def trial(number: int, **values: float) -> Trial:
        curve = (Point(step=1, values=values, seconds=1.0),) if values else ()
        return Trial(number=number, role="search", settings={}, changes={}, seed=0, run=f"r{number}", curve=curve)

    trials = [trial(0), trial(1, ms=3.0), trial(2, ms=2.0), trial(3, ms=2.0)]
    assert [t.number for t in better(Objective(name="ms", goal="min"), trials)] == [2, 3, 1]
    assert [t.number for t in better(Objective(name="ms"), trials)] == [1, 2, 3]
    assert better(Objective(name="AP"), trials) == []
