"""What befell a run and what was done about it becomes one line."""

from pathlib import Path

import pytest

from cluster.recovery import incidents
from cluster.recovery.incidents import Teller, note, note_resumed
from data_sharding.world import World


def test_a_quiet_run_says_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    teller = Teller(tmp_path, "run", lines.append)
    teller.look()
    teller.close()
    assert lines == []
    assert incidents.read(tmp_path) == []


def test_what_happened_waits_for_what_was_done(tmp_path: Path) -> None:
    note(tmp_path, what="long ago")
    lines: list[str] = []
    teller = Teller(tmp_path, "run", lines.append)
    note(tmp_path, what="rank 1 died on 127.0.0.1", ranks=[1])
    teller.look()
    assert lines == []
    note(tmp_path, now="no room")
    note_resumed(tmp_path, step=8, reached=11, total=16, world=World(rank=0, size=2))
    teller.look()
    assert lines == [
        "run: no room",
        "run: rank 1 died on 127.0.0.1; goes on from step 8 of 16 with 2 workers, 3 step(s) are done again",
    ]
    note(tmp_path, what="rank 0 died")
    teller.close()
    assert lines[2:] == ["run: rank 0 died"]
    assert [row.get("redone") for row in incidents.read(tmp_path) if "step" in row] == [3]


def test_a_full_disk_gives_up_what_was_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    teller = Teller(tmp_path, "run", lines.append)
    real = incidents._appended
    assert (tmp_path / incidents.SPARE).stat().st_size == incidents.SPARE_BYTES
    monkeypatch.setattr(incidents, "_appended", lambda *row: not (tmp_path / incidents.SPARE).exists() and real(*row))
    note(tmp_path, now="no room")
    incidents.set_aside(tmp_path)
    teller.close()
    assert lines == ["run: no room"]
    assert [path.name for path in tmp_path.iterdir()] == [incidents.INCIDENTS], "nothing is kept from a run that ended"


def test_a_line_that_a_full_disk_cut_is_passed_over(tmp_path: Path) -> None:
    lines: list[str] = []
    teller = Teller(tmp_path, "run", lines.append)
    (tmp_path / incidents.INCIDENTS).write_bytes(b'{"time": 1, "what": "ra\n7\n')
    note_resumed(tmp_path, step=4, reached=4, total=16, world=World())
    teller.close()
    assert lines == ["run: goes on from step 4 of 16 with 1 worker"]
    note(tmp_path / "missing", what="nothing may fail for want of a message")
