"""Whatever is killed: the same command again ends in the same weights, and no metric is lost or doubled. The run that
is killed reads its teacher cache from elsewhere, which changes nothing."""

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
        "tracking.ranks_every=4",
    ]


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["s"] for row in map(json.loads, lines) if "loss/total" in row["m"]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the undisturbed run is finished."""
    folder = tmp_path_factory.mktemp("storage")
    teacher, log = save_teacher(folder / "weights"), folder / "log"
    assert run(command("train", "digits_scalekd", *settings(folder, "undisturbed", teacher)), log) == 0, log.read_text()
    return folder


def train_and_kill(words: list[str], folder: Path, steps: int, log: Path) -> None:
    """Start a run and kill it, with all its workers, once it has done `steps` in all."""
    driver = start(words, log)
    deadline = time.monotonic() + 900
    while not ((folder / "metrics.jsonl").exists() and len(steps_of(folder)) >= steps):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (folder / "result.json").exists(), "killed too late to test anything"


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line)["m"] for line in (folder / "metrics.jsonl").open()]
    return [row["loss/total"] for row in rows if "loss/total" in row]


@pytest.mark.cluster
def test_a_run_killed_with_all_its_workers_and_started_again_equals_the_undisturbed_one(storage: Path) -> None:
    log, folder = storage / "log", storage / "disturbed"
    far = [f"resources.caches=file://{storage / 'far'}", f"resources.staging={storage / 'copies'}"]  # else the same
    disturbed = command("train", "digits_scalekd", *settings(storage, "disturbed", storage / "weights"), *far)
    train_and_kill(disturbed, folder, 5, log)
    assert run(disturbed, log) == 0, log.read_text()

    names = ("undisturbed", "disturbed")
    facts = [json.loads((storage / name / "student" / "student.json").read_text()) for name in names]
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert facts[0]["metrics"] == facts[1]["metrics"]
    assert steps_of(folder) == list(range(STEPS))
    assert losses_of(storage / "undisturbed") == losses_of(folder)
    told = [row for row in map(json.loads, (folder / "metrics.jsonl").open()) if "ranks/own_s/1" in row["m"]]
    assert [row["s"] for row in told] == [3, 7], "what every rank did, at the end of each window"
    assert all(0 < row["m"]["ranks/communication_share/0"] < 1 for row in told)
    shards = {path.name for path in (storage / "far").glob("*/v*/*.arrow")}
    assert shards
    assert {path.name.partition("-")[2] for path in (storage / "copies").glob("*.arrow")} <= shards

    # Started a third time it is finished; with another recipe under the same name it is refused.
    assert run(disturbed, log) == 0
    assert run([*disturbed, "optim.lr=5e-4"], log) == 2
    assert "optim.lr: 0.01 -> 0.0005" in log.read_text()


@pytest.mark.cluster
@pytest.mark.jobs
def test_a_run_goes_on_with_one_worker_and_again_with_two(storage: Path) -> None:
    """Two, one, two: the losses are the undisturbed run's to rounding, step by step."""
    log, folder = storage / "log", storage / "resized"
    words = command("train", "digits_scalekd", *settings(storage, "resized", storage / "weights"))
    train_and_kill(words, folder, 3, log)
    alone = ["resources.workers=1" if word == "resources.workers=2" else word for word in words]
    train_and_kill(alone, folder, 5, log)
    assert run(words, log) == 0, log.read_text()
    assert steps_of(folder) == list(range(STEPS))
    assert losses_of(folder) == pytest.approx(losses_of(storage / "undisturbed"), rel=1e-4)
    written = [json.loads(path.read_text()) for path in (folder / "train").glob("*/minnow.json")]
    assert written, "Ray Train keeps the newest checkpoints"
    assert all(facts["zero"] == 2 for facts in written)
