"""`ray job submit` runs a recipe on a running cluster: who has no token is refused, the exit code tells how it went,
a stopped job that is submitted again goes on where it was and ends in the same weights."""

import json
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import SMALL_DATA, SMALL_STUDENT
from tests.end_to_end.head import Head, started_head

STEPS = 32
LARGEST_PACKAGE = 20_000_000
"""Bytes. The code is one or two; an environment would be gigabytes."""


def settings(storage: Path, name: str) -> list[str]:
    own = [f"name={name}", f"storage={storage}", f"optim.steps={STEPS}", "resources.checkpoint_every=4"]
    return ["digits_student", *SMALL_DATA, *SMALL_STUDENT, *own]


def steps_of(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [row["s"] for row in map(json.loads, (r for r in rows if r.endswith("\n"))) if "loss/total" in row["m"]]


@pytest.mark.cluster
def test_a_recipe_as_a_job(tmp_path: Path) -> None:
    storage, logs = tmp_path / "storage", tmp_path / "logs"
    logs.mkdir()
    with started_head(tmp_path / "token", cpus=4) as head:
        # What can wait for each other does so together: most of a job's time is Ray's and torch's start.
        stranger = head.submit("stranger", logs / "stranger", *settings(storage, "stranger"), token=False)
        undisturbed = head.submit("whole", logs / "whole", *settings(storage, "undisturbed"))
        _stop_in_the_middle(head, storage, logs)
        assert stranger.wait(timeout=60) == 1
        lost = head.submit("lost", logs / "lost", "digits_student")
        again = head.submit("again", logs / "again", *settings(storage, "disturbed"))
        assert undisturbed.wait(timeout=200) == 0, (logs / "whole").read_text()
        assert again.wait(timeout=200) == 0, (logs / "again").read_text()
        assert lost.wait(timeout=60) == 1
        packages = head.packages()
        sent = [[p for p in package.rglob("*") if p.is_file()] for package in packages]

    told = (logs / "stranger").read_text()
    assert "RAY_AUTH_TOKEN" in told
    assert not (storage / "stranger").exists()
    assert "inside a job every path must be absolute" in (logs / "lost").read_text()
    _same_weights(storage)
    _resumed((logs / "again").read_text())
    _plain_lines((logs / "whole").read_text())
    assert packages
    for package, files in zip(packages, sent, strict=True):
        assert not {".venv", ".git", "runs"} & {p.relative_to(package).parts[0] for p in files}
        assert sum(p.stat().st_size for p in files if p.exists()) < LARGEST_PACKAGE


def _stop_in_the_middle(head: Head, storage: Path, logs: Path) -> None:
    first = head.submit("first", logs / "first", *settings(storage, "disturbed"))
    deadline = time.monotonic() + 200
    while len(steps_of(storage / "disturbed")) < 6:
        assert first.poll() is None, (logs / "first").read_text()
        assert time.monotonic() < deadline, (logs / "first").read_text()
        time.sleep(0.05)
    assert head.stop("first", logs / "stop") == 0, (logs / "stop").read_text()
    first.wait(timeout=60)
    assert "was stopped" in (logs / "stop").read_text()
    assert not (storage / "disturbed" / "result.json").exists(), "stopped too late to test anything"


def _same_weights(storage: Path) -> None:
    facts = [json.loads((storage / n / "student" / "student.json").read_text()) for n in ("undisturbed", "disturbed")]
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert steps_of(storage / "disturbed") == list(range(STEPS))


def _resumed(log: str) -> None:
    """The second job begins behind the checkpoint of the first one, not at step 0."""
    first = next(line for line in log.splitlines() if line.startswith("train disturbed:"))
    assert int(first.split()[2].partition("/")[0]) > 4, log


def _plain_lines(log: str) -> None:
    """A job's log is read as a file: no carriage returns, no bars, a handful of lines about progress."""
    lines = [line for line in log.splitlines() if line.startswith("train undisturbed:")]
    assert 1 <= len(lines) <= 20
    assert lines[-1].startswith(f"train undisturbed: {STEPS}/{STEPS} (100 %)")
    assert "\r" not in log
    assert "trained" in log
