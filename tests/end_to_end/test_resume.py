"""Whatever is killed: the same command again ends in the same weights, and no metric is lost or doubled."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import command, run, save_teacher, start

STEPS = 8


def settings(storage: Path, name: str, teacher: Path) -> list[str]:
    return [
        f"name={name}",
        f"storage={storage}",
        f"teachers.0.weights={teacher}",
        "teachers.0.min_ap=0",
        "teachers.0.gate_images=4",
        "distill.scalekd.start=0.2",
        'distill.scalekd.sdf={"width":16,"token_width":16}',
        'distill.scalekd.csa={"heads":2}',
        f"optim.steps={STEPS}",
        "optim.ema=0.9",
        "resources.workers=2",
        "resources.zero=2",
        "resources.checkpoint_every=2",
    ]


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["s"] for row in map(json.loads, lines) if "loss/total" in row["m"]]


@pytest.mark.cluster
def test_a_run_killed_with_all_its_workers_and_started_again_equals_the_undisturbed_one(tmp_path: Path) -> None:
    teacher, log = save_teacher(tmp_path / "weights"), tmp_path / "log"
    undisturbed = command("train", "digits_scalekd", *settings(tmp_path, "undisturbed", teacher))
    assert run(undisturbed, log) == 0, log.read_text()

    disturbed = command("train", "digits_scalekd", *settings(tmp_path, "disturbed", teacher))
    driver = start(disturbed, log)
    metrics = tmp_path / "disturbed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(steps_of(metrics.parent)) >= 5):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "disturbed" / "result.json").exists(), "killed too late to test anything"
    assert run(disturbed, log) == 0, log.read_text()

    names = ("undisturbed", "disturbed")
    facts = [json.loads((tmp_path / name / "student" / "student.json").read_text()) for name in names]
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert facts[0]["metrics"] == facts[1]["metrics"]
    assert steps_of(tmp_path / "disturbed") == list(range(STEPS))
    rows = [[json.loads(x)["m"] for x in (tmp_path / n / "metrics.jsonl").open()] for n in names]
    losses = [[row["loss/total"] for row in found if "loss/total" in row] for found in rows]
    assert losses[0] == losses[1]

    # Started a third time it is finished; with another recipe under the same name it is refused.
    assert run(disturbed, log) == 0
    assert run([*disturbed, "optim.lr=5e-4"], log) == 2
    assert "optim.lr: 0.01 -> 0.0005" in log.read_text()
