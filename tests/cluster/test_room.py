"""A checkpoint waits for room; a run that gets none stops and can be continued."""

from pathlib import Path

import pytest

from cluster.grammar import ConfigError
from cluster.recovery import incidents, room
from data_sharding.world import World


def test_a_disk_that_takes_the_bytes_has_room(tmp_path: Path) -> None:
    assert room.has_room(tmp_path, 0)
    assert room.has_room(tmp_path, 1 << 20)
    assert not room.has_room(tmp_path, 1 << 60)
    assert not room.has_room(tmp_path / "missing", 1)
    assert list(tmp_path.iterdir()) == []


def wait(folder: Path, needed: int, patience: float, ready: list[bool]) -> None:
    room.wait_for_room(
        folder, needed, World(), what="the checkpoint of step 8", patience=patience, ready=lambda: ready.pop(0)
    )


def test_with_room_nobody_waits_or_says_anything(tmp_path: Path) -> None:
    wait(tmp_path, 100, 60, [True])
    assert incidents.read(tmp_path) == []


def test_room_that_comes_back_is_told_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EVERY", 0.001)
    wait(tmp_path, 2_500_000, 60, [False, False, True])
    told = [row["now"] for row in incidents.read(tmp_path)]
    assert told[0] == f"no room for the checkpoint of step 8 (2.5 MB) in {tmp_path}; waiting for up to 1 minutes"
    assert told[1].startswith("there is room for the checkpoint of step 8 again, after")
    assert len(told) == 2


def test_without_room_the_run_stops_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EVERY", 0.001)
    with pytest.raises(
        ConfigError, match=r"no room for the checkpoint of step 8 .* free some and give the same command"
    ):
        wait(tmp_path, 1 << 60, 0.01, [])
