"""No metric is lost, none is stored twice, and a continued run stays one run in MLflow."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import metric_log
from cluster.config import RunConfig, check, load, to_params
from cluster.grammar import ConfigError, parse
from cluster.metric_log import MetricLog, Row
from cluster.tracking import RUN_FILE, RunHandle, git_state, open_run


class Tracker:
    """Keeps what it is shipped as MLflow does, one row per key, step, time and value; may be down."""

    def __init__(self, down: int = 0) -> None:
        self.down, self.calls, self.rows = down, 0, set[Row]()

    def __call__(self, rows: list[Row]) -> None:
        self.calls += 1
        if self.down:
            self.down -= 1
            raise ConnectionError("the tracker is down")
        self.rows |= set(rows)

    def numbers(self) -> dict[tuple[str, int], float]:
        assert len({(row.key, row.step) for row in self.rows}) == len(self.rows), "a step is stored twice"
        return {(row.key, row.step): row.value for row in self.rows}


def never(rows: list[Row]) -> None:
    raise ConnectionError("the tracker is away for good")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_a_log_without_rows_ships_nothing(path: Path) -> None:
    tracker = Tracker()
    log = MetricLog(path, tracker)
    log.log(0, {})
    assert log.close()
    assert tracker.calls == 0
    assert path.read_text() == ""


def test_every_row_arrives(path: Path) -> None:
    tracker = Tracker()
    log = MetricLog(path, tracker, every=0.01)
    for step in range(1000):
        log.log(step, {"loss/total": step / 2, "time/data_s": 0.1})
    assert log.close()
    assert tracker.numbers() == {("loss/total", s): s / 2 for s in range(1000)} | {
        ("time/data_s", s): 0.1 for s in range(1000)
    }


def test_a_tracker_that_was_down_gets_all_rows_in_the_end(path: Path) -> None:
    tracker, told = Tracker(down=3), list[str]()
    log = MetricLog(path, tracker, every=0.01, tell=told.append)
    for step in range(10):
        log.log(step, {"loss": 1.0})
    assert log.close()
    assert log.failure is None
    assert len(tracker.numbers()) == 10
    assert [text.partition(" (")[0] for text in told] == [
        "the tracker does not answer",
        "the tracker answers again and has all metrics",
    ]


def test_rows_wait_for_the_next_process_when_the_tracker_stays_away(path: Path) -> None:
    log = MetricLog(path, never, every=0.01)
    log.log(1, {"loss": 1.0})
    assert not log.close(timeout=0.3)
    assert isinstance(log.failure, ConnectionError)
    tracker = Tracker()
    assert MetricLog(path, tracker).close()
    assert tracker.numbers() == {("loss", 1): 1.0}


def test_logging_never_waits_for_the_tracker(path: Path) -> None:
    gate = threading.Event()

    def wait(rows: list[Row]) -> None:
        gate.wait(10)

    for every in (0.001, 60.0):  # stuck before the log closes, stuck by closing it
        log = MetricLog(path, wait, every=every)
        began = time.monotonic()
        for step in range(100):
            log.log(step, {f"loss/{every}": 1.0})
        assert not log.close(timeout=0.05)
        assert time.monotonic() - began < 5
    gate.set()


def test_a_step_that_is_done_again_is_stored_once(path: Path) -> None:
    tracker = Tracker()
    first = MetricLog(path, tracker)
    for step in range(5):
        first.log(step, {"loss": float(step)})
    first.close()
    # The run resumes at its checkpoint of step 3; step 4 now also has what it had no time to write before.
    second = MetricLog(path, tracker)
    second.log(3, {"loss": 99.0})
    second.log(4, {"loss": 99.0, "val/AP": 0.5})
    second.log(5, {"loss": 5.0})
    second.close()
    assert tracker.numbers() == {("loss", s): float(s) for s in range(6)} | {("val/AP", 4): 0.5}


def test_a_step_that_comes_out_otherwise_is_told(path: Path) -> None:
    first = MetricLog(path, never, every=60)
    for step in range(4):
        first.log(step, {"loss/total": 1.0, "loss/a": step / 4, "time/step_s": 1.0})
    first.close(timeout=0)
    second = MetricLog(path, never, every=60, begin=2)
    assert second.reached == 4
    second.log(2, {"loss/total": 1.0, "loss/a": 0.5, "time/step_s": 9.0})
    assert second.difference is None
    second.log(3, {"loss/total": 1.0 + 1e-9, "loss/a": 0.75})
    second.log(4, {"loss/total": 7.0})
    second.close(timeout=0)
    found = second.difference
    assert found is not None
    assert (found.key, found.step, found.was, found.now) == ("loss/total", 3, 1.0, 1.0 + 1e-9)
    assert "loss/total of step 3 was 1.0 and is 1.000000001" in str(found)


def test_rows_wait_in_memory_while_the_disk_is_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a disk that takes a few bytes more."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    tracker = Tracker()
    log = MetricLog(path, tracker, every=0.01)
    full = Full(log._file)
    monkeypatch.setattr(log, "_file", full)
    log.log(1, {"loss": 1.0})
    log.log(2, {"loss": 2.0})
    assert path.stat().st_size == 10
    with pytest.raises(OSError, match="No space"):
        log.sync()
    full.room = 1000
    log.sync()
    assert log.close()
    assert tracker.numbers() == {("loss", 1): 1.0, ("loss", 2): 2.0}
    log = MetricLog(path, tracker)
    monkeypatch.setattr(log, "_file", Full(log._file))
    log.log(3, {"loss": 3.0})
    assert not log.close(timeout=1), "a row is lost: its step must be done again"


def test_a_disk_that_does_not_take_the_mark_is_not_a_tracker_that_is_away(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metric_log, "_write_mark", full)
    tracker, told = Tracker(), list[str]()
    log = MetricLog(path, tracker, every=0.01, tell=told.append)
    log.log(1, {"loss": 1.0})
    assert log.close()
    assert told == []
    assert tracker.numbers() == {("loss", 1): 1.0}


def test_one_step_may_be_written_in_parts(path: Path) -> None:
    tracker = Tracker()
    log = MetricLog(path, tracker)
    log.log(1, {"loss": 1.0})
    log.log(1, {"val/AP": 2.0, "loss": 3.0})
    log.close()
    assert tracker.numbers() == {("loss", 1): 1.0, ("val/AP", 1): 2.0}


@pytest.mark.parametrize("mark", [None, "", "rubbish", "999999999"])
def test_a_lost_mark_ships_again_and_stores_nothing_twice(path: Path, mark: str | None) -> None:
    tracker = Tracker()
    log = MetricLog(path, tracker)
    log.log(1, {"loss": 1.0})
    log.close()
    file = path.with_suffix(".shipped")
    file.unlink() if mark is None else file.write_text(mark)
    log = MetricLog(path, tracker)
    log.log(2, {"loss": 2.0})
    assert log.close()
    assert tracker.numbers() == {("loss", 1): 1.0, ("loss", 2): 2.0}


def test_half_a_line_of_a_killed_process_is_dropped(path: Path) -> None:
    tracker = Tracker()
    log = MetricLog(path, never, every=10)
    log.log(1, {"loss": 1.0})
    log.close(timeout=0)
    path.write_bytes(path.read_bytes() + b'{"t": 5, "s": 2, "m": {"lo')
    log = MetricLog(path, tracker)
    log.log(2, {"loss": 2.0})
    assert log.close()
    assert tracker.numbers() == {("loss", 1): 1.0, ("loss", 2): 2.0}


def test_a_long_run_remembers_its_keys_once_and_not_per_step(path: Path) -> None:
    """25 keys a step in sets of their own would be 200 MB after 90k steps."""
    log = MetricLog(path, lambda rows: None, every=10)
    for step in range(50):
        log.log(step, {f"loss/{i}": 1.0 for i in range(5)})
        log.log(step, {"time/step_s": 1.0})
    log.close()
    assert len({id(keys) for keys in log._written.values()}) == 1


def test_numbers_that_are_not_finite_are_kept(path: Path) -> None:
    tracker = Tracker()
    log = MetricLog(path, tracker)
    log.log(1, {"loss": float("inf")})
    assert log.close()
    assert tracker.numbers() == {("loss", 1): float("inf")}


def test_the_commit_is_told_or_unknown() -> None:
    state = git_state()
    assert set(state) == {"git.commit", "git.dirty"}
    assert state["git.dirty"] in ("true", "false", "unknown")


@pytest.fixture
def config() -> RunConfig:
    return load("digits_student", {"name": "first", "tracking.experiment": "tests"})


@pytest.mark.cluster
def test_a_run_is_opened_filled_continued_and_closed(tmp_path: Path, config: RunConfig) -> None:
    from mlflow import MlflowClient

    run = open_run(config, tmp_path, {"dataset.uid": "abc"})
    client = MlflowClient(tracking_uri=run.uri)
    assert run.uri.startswith("sqlite:///")
    log = MetricLog(tmp_path / "first" / "metrics.jsonl", run.ship, every=0.05)
    for step in range(3):
        log.log(step, {"loss/task/cls": 1.0 - step / 10, "lr/backbone": 1e-3})
    assert log.close()
    with run.machine_metrics("worker0", every=1):
        run.add_file(tmp_path / "first" / RUN_FILE, "samples")
    run.close("FAILED")

    # The next start of the same run, on more workers, with its metric mark lost.
    (tmp_path / "first" / "metrics.shipped").unlink()
    again = open_run(check(parse("resources: {workers: 2}", "t") | _tree(config), "t"), tmp_path)
    assert again == run
    log = MetricLog(tmp_path / "first" / "metrics.jsonl", again.ship)
    log.log(2, {"loss/task/cls": 7.0})
    log.log(3, {"loss/task/cls": 0.7})
    assert log.close()
    again.close("FINISHED")

    found = client.get_run(run.run_id)
    history = client.get_metric_history(run.run_id, "loss/task/cls")
    assert sorted((m.step, m.value) for m in history) == [(0, 1.0), (1, 0.9), (2, 0.8), (3, 0.7)]
    assert found.data.params == to_params(config)
    assert found.data.tags["restarted.resources.workers"] == "2"
    assert found.data.tags["dataset.uid"] == "abc"
    assert found.info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(run.run_id)} >= {"recipe.yaml", "samples"}
    assert len(client.search_runs([found.info.experiment_id])) == 1

    (tmp_path / "first" / RUN_FILE).write_text(json.dumps({"run_id": "0" * 32}))
    with pytest.raises(ConfigError, match="delete this file to begin a new record"):
        open_run(config, tmp_path)


def _tree(config: RunConfig) -> dict[str, object]:
    from cluster.config import to_tree

    return {key: value for key, value in to_tree(config).items() if key != "resources"}


@pytest.mark.parametrize(
    "uri",
    [
        "http://someone:geheim1234@host:5000",
        "http://:geheim1234@host",
        "postgresql://someone:geheim1234@host/runs",
        "postgresql://host/runs?user=someone&password=geheim1234",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking: .*MLFLOW_TRACKING_PASSWORD") as told:
        load("digits_student", {"tracking.uri": uri})
    assert "geheim1234" not in str(told.value)


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "postgresql://someone@host:5432/runs", "sqlite:////data/mlflow.db", "file:/data/runs"]
)
def test_an_address_without_a_password_is_taken(uri: str) -> None:
    assert load("digits_student", {"tracking.uri": uri}).tracking.uri == uri


def test_the_record_needs_a_folder(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="needs a folder"):
        open_run(config, "s3://bucket/runs")


def test_a_handle_travels_to_workers() -> None:
    import pickle

    handle = RunHandle("id", "uri")
    assert pickle.loads(pickle.dumps(handle)) == handle
