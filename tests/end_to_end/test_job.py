"""`ray job submit` runs a recipe on a running cluster: who has no token is refused, the exit code tells how it went,
a stopped job that is submitted again goes on where it was and ends in the same weights."""

import json
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.commands import SMALL_DATA, SMALL_STUDENT
from tests.end_to_end.head import PATIENCE, Head, started_head

STEPS, EVERY = 24, 4
LARGEST_PACKAGE = 20_000_000
"""Bytes. The code is one or two; an environment would be gigabytes."""


def settings(storage: Path, name: str) -> list[str]:
    own = [f"name={name}", f"storage={storage}", f"optim.steps={STEPS}", f"resources.checkpoint_every={EVERY}"]
    own += ["resources.keep=100"]
    return ["digits_student", *SMALL_DATA, *SMALL_STUDENT, *own]


def steps_of(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [row["s"] for row in map(json.loads, (r for r in rows if r.endswith("\n"))) if "loss/total" in row["m"]]


@pytest.mark.jobs
def test_a_recipe_as_a_job(tmp_path: Path) -> None:
    storage, logs = tmp_path / "storage", tmp_path / "logs"
    logs.mkdir()
    with started_head(tmp_path / "token") as head:
        # What can wait for each other does so together: most of a job's time is Ray's and torch's start.
        stranger = head.submit("stranger", logs / "stranger", *settings(storage, "stranger"), token=False)
        _stop_in_the_middle(head, storage, logs)
        assert stranger.wait(timeout=PATIENCE) == 1
        lost = head.submit("lost", logs / "lost", "digits_student")
        other = head.send(logs / "other", *settings(storage, "disturbed"), "optim.lr=0.123")
        again = head.send(logs / "again", *settings(storage, "disturbed"))
        whole = head.submit("whole", logs / "whole", *settings(storage, "undisturbed"))
        assert again.wait(timeout=PATIENCE) == 0, (logs / "again").read_text()
        assert whole.wait(timeout=PATIENCE) == 0, (logs / "whole").read_text()
        assert lost.wait(timeout=PATIENCE) == 1
        assert other.wait(timeout=PATIENCE) == 2  # the command's own code, which `ray job submit` turns into 1
        packages = head.packages()
        sent = [[p for p in package.rglob("*") if p.is_file()] for package in packages]
        total = [sum(p.stat().st_size for p in files) for files in sent]

    assert "RAY_AUTH_TOKEN" in (logs / "stranger").read_text()
    assert not (storage / "stranger").exists()
    assert "inside a job every path must be absolute" in (logs / "lost").read_text()
    assert "was begun with another recipe" in (logs / "other").read_text()
    _same_weights(storage)
    _plain_lines((logs / "whole").read_text())
    assert packages
    for package, files in zip(packages, sent, strict=True):
        assert not {".venv", ".git", "runs"} & {p.relative_to(package).parts[0] for p in files}
    assert max(total) < LARGEST_PACKAGE


def _stop_in_the_middle(head: Head, storage: Path, logs: Path) -> None:
    """`ray job stop` when half of the steps are done. The worker is held there meanwhile: it is faster than a
    command's start."""
    first = head.submit("first", logs / "first", *settings(storage, "disturbed"))
    deadline = time.monotonic() + PATIENCE
    while len(steps_of(storage / "disturbed")) < STEPS // 2:
        assert first.poll() is None, (logs / "first").read_text()
        assert time.monotonic() < deadline, (logs / "first").read_text()
        time.sleep(0.02)
    workers = head.processes("RayTrainWorker")
    assert workers
    for worker in workers:
        worker.suspend()
    assert len(steps_of(storage / "disturbed")) < STEPS - EVERY
    assert head.stop("first", logs / "stop") == 0, (logs / "stop").read_text()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    assert "was stopped" in (logs / "stop").read_text()
    assert first.wait(timeout=PATIENCE) == 0  # Ray's own reading: stopped on purpose is no failure


def _same_weights(storage: Path) -> None:
    facts = [json.loads((storage / n / "student" / "student.json").read_text()) for n in ("undisturbed", "disturbed")]
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert steps_of(storage / "disturbed") == list(range(STEPS))
    # All are kept: begun anew it would have left those of the first job and a whole row of its own. One more is the
    # one that the first job was writing.
    kept = len(list((storage / "disturbed" / "train").glob("checkpoint_*")))
    assert STEPS // EVERY <= kept <= STEPS // EVERY + 1


def _plain_lines(log: str) -> None:
    """A job's log is read as a file: no carriage returns, no bars, a handful of lines about progress."""
    lines = [line for line in log.splitlines() if line.startswith("train undisturbed:")]
    assert 1 <= len(lines) <= 20
    assert lines[-1].startswith(f"train undisturbed: {STEPS}/{STEPS} (100 %)")
    assert "\r" not in log
    assert "trained" in log
