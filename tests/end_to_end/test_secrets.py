"""No secret of a person's environment or addresses is written anywhere by a run."""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.commands import ROOT, command

NAMES = ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "FSSPEC_S3_SECRET", "PGPASSWORD", "SOME_TOKEN")


@pytest.fixture
def home() -> Iterator[Path]:
    """For everything that a run may write beside its storage."""
    folder = Path(tempfile.mkdtemp(prefix="minnow"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(home: Path, words: list[str], planted: dict[str, str]) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_TMPDIR": str(home), "TMPDIR": str(home), "HOME": str(home), "OMP_NUM_THREADS": "1"} | planted
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=own)


def holding(places: list[Path], secret: str) -> list[Path]:
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.jobs
def test_a_secret_of_the_environment_is_in_no_file_of_a_run(home: Path, tmp_path: Path) -> None:
    planted = {name: secrets.token_hex(16) for name in NAMES}
    settings = [f"storage={tmp_path / 'storage'}", "name=run", "optim.steps=3", "resources.checkpoint_every=1"]
    done = run(home, command("train", "digits_student", *settings), planted)
    assert done.returncode == 0, done.stderr
    for name, secret in planted.items():
        assert holding([home, tmp_path], secret) == [], name
        assert secret not in done.stdout + done.stderr
    # What was searched is all that there is to search: Ray's logs, checkpoints, the record.
    assert list(home.rglob("gcs_server.out"))
    assert list(tmp_path.rglob("assistants_and_average.pt"))
    assert holding([tmp_path], "loss/total")


def test_a_password_in_an_address_stops_the_run_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    secret = secrets.token_hex(16)
    settings = [f"storage={tmp_path / 'storage'}", "name=run", f"tracking.uri=http://me:{secret}@192.0.2.1:5000"]
    done = run(home, command("train", "digits_student", *settings), {})
    assert done.returncode == 2
    assert "holds a password" in done.stderr
    assert secret not in done.stdout + done.stderr
    assert not (tmp_path / "storage").exists()
    assert holding([home], secret) == []
