"""A run has one driver at a time, and none that is dead."""

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cluster.grammar import ConfigError
from cluster.recovery.claim import alone


def _hold(folder: Path, told: Connection) -> None:
    with alone(folder, patience=0):
        told.send("held")
        signal.pause()


@pytest.fixture
def holder(tmp_path: Path) -> BaseProcess:
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path, its), daemon=True)
    process.start()
    assert mine.recv() == "held"
    return process


def test_a_second_driver_is_refused_with_the_firsts_place_and_let_in_when_that_is_killed(
    tmp_path: Path, holder: BaseProcess
) -> None:
    with pytest.raises(ConfigError, match=f"driven by process {holder.pid} on"), alone(tmp_path, patience=0):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with alone(tmp_path, patience=0) as cut_off:
        assert cut_off.startswith(f"process {holder.pid} on ")


def test_a_run_can_be_driven_again_and_again(tmp_path: Path) -> None:
    for _ in range(2):
        with suppress(KeyboardInterrupt), alone(tmp_path, patience=0) as cut_off:
            assert cut_off == "", "who ended by itself was not cut off"
            raise KeyboardInterrupt
