"""Runs that begin together share their data."""

import fcntl
import os
from pathlib import Path

import pytest

from cluster import packing
from cluster.build import split_folder
from tests.cluster.test_scoring import recipe


def test_a_run_waits_for_another_one_that_packs_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path)
    folder = split_folder(config, "train")
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    told: list[str] = []

    def hear(text: str) -> None:
        """The other one is done as soon as this one has said that it waits."""
        told.append(text)
        os.close(held)

    monkeypatch.setattr(packing, "PATIENCE", 0.01)
    monkeypatch.setattr(packing, "say", hear)
    packed = packing.pack_splits(config)
    assert len(packed["train"]) == 8
    assert len(told) == 1
    assert told[0].startswith("another process is packing into")
    assert told[0].endswith("; waiting for it")
