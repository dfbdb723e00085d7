"""A comparison that is killed goes on where it was: finished runs stay finished, and nothing is done twice."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.commands import command, save_teacher, start

STEPS = 2
PATIENCE = 1800
"""Seconds: only a run that hangs takes longer, however many share the machine."""


def words(storage: Path, teacher: Path) -> list[str]:
    settings = [
        f"storage={storage}",
        f"teachers.0.weights={teacher}",
        "teachers.0.min_ap=0",
        "teachers.0.gate_images=4",
        f"optim.steps={STEPS}",
        'distill={"scalekd":{"start":0.0,"beta":0.0,"gamma":0.0,"sdf":{"width":16,"token_width":16}}}',
    ]
    asked = ["--methods", "scalekd,cwd", "--references", "none", "--seeds", "1"]
    return [*command("compare_methods", "digits_scalekd", *settings), *asked]


def rows(storage: Path) -> list[str]:
    path = storage / "digits_scalekd_comparison" / "comparison.json"
    return [found["row"] for found in json.loads(path.read_text())["runs"]] if path.exists() else []


@pytest.mark.jobs
def test_a_comparison_killed_after_two_rows_does_the_third_alone(tmp_path: Path) -> None:
    teacher, log = save_teacher(tmp_path / "weights"), tmp_path / "log"
    driver = start(words(tmp_path, teacher), log)
    deadline = time.monotonic() + PATIENCE
    try:
        while len(rows(tmp_path)) < 2:
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert len(rows(tmp_path)) == len(results) == 2, "killed too late to test anything"

    assert start(words(tmp_path, teacher), log).wait(PATIENCE) == 0, log.read_text()
    assert rows(tmp_path) == ["plain", "scalekd", "cwd"]
    assert {path: path.stat().st_mtime_ns for path in results} == results
    for row in rows(tmp_path):
        lines = (tmp_path / f"digits_scalekd_{row}_seed0" / "metrics.jsonl").read_text().splitlines()
        assert [x["s"] for x in map(json.loads, lines) if "loss/total" in x["m"]] == list(range(STEPS))
    # ScaleKD reads c5 and pyramid, CWD the pyramid: one cache was filled for both.
    assert len(list((tmp_path / "caches").iterdir())) == 1
    _one_record(tmp_path)

    # Once more: all is done.
    assert start([*words(tmp_path, teacher), "--show"], log).wait(PATIENCE) == 0, log.read_text()
    assert "3 run(s) done" in log.read_text()


def _one_record(storage: Path) -> None:
    """In MLflow: one parent that holds table and plot, and the three runs below it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("minnow")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) == 1
    children = {r.data.tags["comparison.row"] for r in found if r is not parents[0]}
    assert (len(found), children) == (4, {"plain", "scalekd", "cwd"})
    assert {r.data.tags.get("mlflow.parentRunId") for r in found if r is not parents[0]} == {parents[0].info.run_id}
    assert all(r.info.status == "FINISHED" for r in found)
    kept = {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert kept >= {"comparison.csv", "comparison.png", "comparison.json"}
    assert parents[0].data.metrics["AP/cwd"] >= 0
