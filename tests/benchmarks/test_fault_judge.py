"""What a fault must not change is seen where it did."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_judge import good, judge
from benchmarks.fault_scene import SAVE_EVERY, Scene
from cluster.recovery import incidents
from data_sharding.world import World

Row = dict[str, Any]


def write(folder: Path, rows: list[Row], sha256: str) -> None:
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "student.json").write_text(json.dumps({"sha256": sha256}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def store(storage: Path, rows: list[tuple[str, int, int, float]]) -> Path:
    path = storage / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table metrics (run_uuid text, key text, step int, timestamp int, value double)")
        connection.executemany("insert into metrics values ('id', ?, ?, ?, ?)", rows)
    return path


def rows() -> list[Row]:
    return [{"t": 10 + s, "s": s, "m": {"loss/total": 1.0 / (1 + s), "time/step_s": 0.5}} for s in range(6)]


def judged(tmp_path: Path, change: Callable[[list[Row]], Any], sha256: str = "same", redone: int = 2) -> Row:
    mine = rows()
    change(mine)
    write(tmp_path / "undisturbed", rows(), "same")
    write(tmp_path / "run", [{k: v for k, v in row.items() if k != "stored"} for row in mine], sha256)
    (tmp_path / "run" / "mlflow_run.json").write_text('{"run_id": "id"}')
    stored = [row.pop("stored", row["m"]) for row in mine]
    kept = [(k, row["s"], row["t"], v) for row, values in zip(mine, stored, strict=True) for k, v in values.items()]
    scene = Scene(storage=tmp_path, name="run", seed=0, struck=1.0, facts={"moment": "training"})
    incidents.note_resumed(scene.folder, step=4, reached=4 + redone, total=6, world=World())
    scene.log.write_text("trained\nrun: rank 1 died; goes on from step 4 of 6 with 1 worker\n")
    found = judge(scene, tmp_path / "undisturbed", store(tmp_path, [*kept, ("system/cpu", 1, 1, 1.0)]))
    return {name: found[name] for name in ("metrics_lost", "metrics_doubled", "metrics_changed", "redone")} | {
        "good": good(found)
    }


def test_a_run_that_ended_as_the_undisturbed_one_is_good(tmp_path: Path) -> None:
    found = judged(tmp_path, lambda rows: rows[3]["m"].update({"time/step_s": 9.0}))
    assert found == {"metrics_lost": 0, "metrics_doubled": 0, "metrics_changed": 0, "redone": 2, "good": True}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda rows: rows.pop(2), {"metrics_lost": 2}),
        (lambda rows: rows[2]["m"].pop("loss/total"), {"metrics_lost": 1}),
        (lambda rows: rows[2].update(stored={}), {"metrics_lost": 2}),
        (lambda rows: rows[2].update(stored={"loss/total": 0.3, "time/step_s": 0.5}), {"metrics_changed": 1}),
        (lambda rows: rows.append({**rows[2], "t": 99}), {"metrics_doubled": 4}),
        (lambda rows: rows[2]["m"].update({"loss/total": 0.3333}), {"metrics_changed": 1}),
    ],
    ids=["row", "number", "not in MLflow", "other in MLflow", "twice", "changed"],
)
def test_a_number_that_is_lost_doubled_or_changed_is_counted(
    tmp_path: Path, change: Callable[[list[Row]], Any], wrong: dict[str, int]
) -> None:
    found = judged(tmp_path, change)
    assert {name: found[name] for name in wrong} == wrong
    assert not found["good"]


def test_other_weights_and_too_many_steps_done_again_are_seen(tmp_path: Path) -> None:
    assert not judged(tmp_path / "weights", lambda rows: None, sha256="other")["good"]
    assert not judged(tmp_path / "steps", lambda rows: None, redone=SAVE_EVERY + 1)["good"]
