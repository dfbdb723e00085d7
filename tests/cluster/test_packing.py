"""Runs that begin together share their data."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from cluster import packing
from cluster.build import split_folder
from tests.cluster.test_scoring import recipe


def test_a_run_waits_for_another_one_that_packs_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PATIENCE", 0.01)
    config = recipe(tmp_path)
    folder = split_folder(config, "train")
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    def let_go() -> None:
        time.sleep(0.3)
        os.close(held)

    other = threading.Thread(target=let_go)
    other.start()
    packed = packing.pack_splits(config)
    other.join()
    assert len(packed["train"]) == 8
    told = capsys.readouterr().err
    assert told.count("another process is packing into") == 1
    assert "waiting for it" in told
