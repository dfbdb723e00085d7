"""A search that is killed goes on where it was: finished trials stay finished, a running one is continued from its
checkpoint, the searcher draws what it would have drawn, and MLflow has one run for each."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import load
from cluster.results import METRICS
from tests.end_to_end.commands import SMALL_DATA, SMALL_STUDENT, save_teacher, start
from tuning.trial_store import store_of
from tuning.trials import Found, Trial

STEPS = 6
PATIENCE = 3600
"""Seconds: only a search that hangs takes longer, however many share the machine."""
SPACE = """
keys:
  distill.scalekd.alpha: {loguniform: [1e-4, 1e-1]}
  distill.scalekd.sdf.token_width: {choice: [16, 32]}
"""
NAME = "digits_scalekd_small"


def words(storage: Path, *settings: str) -> list[str]:
    space = storage / "small.yaml"
    space.write_text(SPACE)
    teacher = storage / "weights"
    if not teacher.exists():
        save_teacher(teacher)
    given = [
        f"storage={storage}",
        f"teachers.0.weights={teacher}",
        "teachers.0.min_ap=0",
        "teachers.0.gate_images=4",
        f"optim.steps={STEPS}",
        "resources.checkpoint_every=2",
        'distill={"scalekd":{"start":0.0,"beta":0.0,"gamma":0.0,"sdf":{"width":16,"token_width":16}}}',
        "search.objectives=[AP]",
        "search.at_once=1",
    ]
    command = [sys.executable, "-m", "tuning.search", "digits_scalekd", str(space)]
    return [*command, *SMALL_DATA, *SMALL_STUDENT, *given, *settings]


def found(storage: Path) -> Found | None:
    store = store_of(storage / f"{NAME}_search")
    return store.read() if store.exists() else None


def steps_of(storage: Path, trial: Trial) -> list[int]:
    """The steps whose loss is in the run's metrics file."""
    path = storage / trial.run / METRICS
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row["s"] for row in map(json.loads, whole) if "loss/total" in row["m"]]


def wait_for(holds: Callable[[], Any], driver: Any, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def second_is_training(storage: Path) -> bool:
    """The first trial has ended, and the second has done steps but not all."""
    now = found(storage)
    if now is None or len(now.trials) < 2 or now.trials[0].state != "finished":
        return False
    return bool(steps_of(storage, now.trials[1]))


@pytest.mark.jobs
def test_a_search_whose_driver_is_killed_does_what_is_left_and_nothing_twice(tmp_path: Path) -> None:
    log, settings = tmp_path / "log", ["search.trials=3", "search.seeds=2", "search.best=1"]
    driver = start(words(tmp_path, *settings), log)
    try:
        wait_for(lambda: second_is_training(tmp_path), driver, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    killed = found(tmp_path)
    assert killed is not None
    result = tmp_path / killed.trials[0].run / "result.json"
    written = result.stat().st_mtime_ns
    assert killed.trials[1].state == "running", "killed too late to test anything"

    assert start(words(tmp_path, *settings), log).wait(PATIENCE) == 0, log.read_text()
    ended = found(tmp_path)
    assert ended is not None
    assert ended.conclusion is not None
    assert [t.role for t in ended.trials] == ["search"] * 3 + ["plain", "plain", "again"]
    assert {t.state for t in ended.trials} == {"finished"}
    assert [t.starts for t in ended.trials] == [1, 2, 1, 1, 1, 1]
    assert [t.settings for t in ended.trials[:2]] == [t.settings for t in killed.trials[:2]]
    assert result.stat().st_mtime_ns == written
    for trial in ended.trials:
        assert steps_of(tmp_path, trial) == list(range(STEPS)), trial
        assert trial.seconds > 0
        assert trial.value("AP") is not None
    assert len(list((tmp_path / "caches").glob("teacher-*"))) == 1
    best = load(tmp_path / f"{NAME}_search" / "best.yaml", {})
    drawn = ended.trials[ended.conclusion.best].settings
    assert vars(best.distill["scalekd"])["alpha"] == drawn["distill.scalekd.alpha"]
    _one_record(tmp_path, ended)

    # Once more: all is done, and the answer is told again.
    assert start(words(tmp_path, *settings), log).wait(PATIENCE) == 0, log.read_text()
    assert found(tmp_path) == ended


def _one_record(storage: Path, ended: Found) -> None:
    """In MLflow: one parent with the files, a finished child per trial, the best one marked."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("minnow")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(ended.search.parent_run)
    assert parent.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"best.yaml", "search.json"}
    assert set(runs) == {t.run_id for t in ended.trials}
    assert {r.data.tags["mlflow.parentRunId"] for r in runs.values()} == {parent.info.run_id}
    assert all(r.info.status == "FINISHED" for r in runs.values())
    assert ended.conclusion is not None
    marked = [i for i, r in runs.items() if r.data.tags.get("search.best") == "true"]
    assert marked == [ended.trials[ended.conclusion.best].run_id]
    for trial in ended.of_role("search"):
        told = runs[trial.run_id or ""].data
        assert float(told.params["distill.scalekd.alpha"]) == trial.settings["distill.scalekd.alpha"]
        assert told.tags.keys() >= {"cache.teacher", "teacher.teacher", "data.train", "git.commit"}


@pytest.mark.jobs
def test_a_trial_whose_process_is_killed_is_continued_by_the_same_driver(tmp_path: Path) -> None:
    steps = 60
    log, settings = tmp_path / "log", ["search.trials=1", "search.seeds=1", f"optim.steps={steps}"]
    driver = start(words(tmp_path, *settings), log)

    def training() -> bool:
        now = found(tmp_path)
        return now is not None and bool(now.trials) and len(steps_of(tmp_path, now.trials[0])) >= 3

    try:
        wait_for(training, driver, log)
        family = psutil.Process(driver.pid).children(recursive=True)
        # What Ray Tune calls the process of a function.
        processes = [p for p in family if p.is_running() and p.name().startswith("ray::ImplicitFu")]
        assert processes, [p.name() for p in family]
        for each in processes:
            each.kill()
        (killed,) = (found(tmp_path) or pytest.fail("no store")).trials
        assert not (tmp_path / killed.run / "result.json").exists(), "killed too late to test anything"
        assert driver.wait(PATIENCE) == 0, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    ended = found(tmp_path)
    assert ended is not None
    (trial,) = ended.trials
    assert (trial.state, trial.starts) == ("finished", 2)
    assert steps_of(tmp_path, trial) == list(range(steps))
    assert "goes on from its last checkpoint" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.jobs
def test_a_trial_that_begins_at_the_gate_is_the_one_that_began_at_step_0(tmp_path: Path) -> None:
    """The same trial with and without a common warm-up: equal losses, to the bit, from the gate on."""
    settings = ["search.trials=1", "search.seeds=1", "distill.scalekd.start=0.5", "search.searcher=random"]
    curves: list[dict[int, float]] = []
    for how in ("shared", "own"):
        storage = tmp_path / how
        storage.mkdir()
        log = storage / "log"
        given = words(storage, *settings, f"search.warmup={how}")
        assert start(given, log).wait(PATIENCE) == 0, log.read_text()
        ended = found(storage)
        assert ended is not None
        trial = ended.of_role("search")[0]
        assert (trial.origin is not None) == (how == "shared")
        rows = map(json.loads, (storage / trial.run / METRICS).read_text().splitlines())
        curves.append({row["s"]: row["m"]["loss/total"] for row in rows if "loss/total" in row["m"]})
    forked, whole = curves
    assert sorted(forked) == list(range(STEPS // 2, STEPS))
    assert forked == {step: loss for step, loss in whole.items() if step >= STEPS // 2}
