"""A run that is finished hands its record over when the server answers, once, and never fails for it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.metric_log import MetricLog, Row
from cluster.recovery import delivery
from cluster.recovery.delivery import deliver, delivered


@dataclass
class Server:
    """Stands for an MLflow run whose server may be away for some calls."""

    away: int = 0
    run_id: str = "1"
    uri: str = "http://127.0.0.1:1"
    rows: set[Row] = field(default_factory=set)
    files: list[str] = field(default_factory=list)
    status: str = "RUNNING"

    def ship(self, rows: list[Row]) -> None:
        self._answer()
        self.rows |= set(rows)

    def add_file(self, path: Path) -> None:
        self._answer()
        self.files.append(path.name)

    def close(self, status: str) -> None:
        self._answer()
        self.status = status

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise ConnectionError("refused")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of which no row was shipped."""
    folder = tmp_path / "run"

    def never(rows: list[Row]) -> None:
        raise ConnectionError

    log = MetricLog(folder / "metrics.jsonl", never, every=60)
    log.log(1, {"loss/total": 1.0})
    assert not log.close(timeout=0)
    (folder / "detections.json").write_text("[]")
    (folder / "mlflow_run.json").write_text(json.dumps({"run_id": "1", "uri": "http://127.0.0.1:1"}))
    return folder


@pytest.mark.parametrize("away", [0, 1, 3])
def test_rows_files_and_the_end_arrive(folder: Path, away: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PAUSE", 0.01)
    server, told = Server(away=away), list[str]()
    assert not delivered(folder)
    assert deliver(folder, server, told.append)  # pyright: ignore[reportArgumentType] # stands for a handle
    assert {(row.key, row.step) for row in server.rows} == {("loss/total", 1)}
    assert server.files[-1] == "detections.json"
    assert server.status == "FINISHED"
    assert told == []
    assert delivered(folder)
    assert json.loads((folder / "mlflow_run.json").read_text())["run_id"] == "1"


def test_a_server_that_stays_away_is_told_and_all_waits_for_the_next_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "PAUSE", 0.01)
    server, told = Server(away=10**9), list[str]()
    assert not deliver(folder, server, told.append, patience=0.2)  # pyright: ignore[reportArgumentType] # as above
    assert len(told) == 1
    assert told[0].startswith("run: http://127.0.0.1:1 does not answer (refused); metrics and files stay in")
    assert not delivered(folder)
    server.away = 0
    assert deliver(folder, server, told.append)  # pyright: ignore[reportArgumentType] # as above
    assert len(server.rows) == 1
    assert delivered(folder)
