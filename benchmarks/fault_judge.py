"""Whether a run that a fault befell ended as the one that nothing befell."""

import json
import sqlite3
from pathlib import Path
from typing import Any

from benchmarks.fault_scene import SAVE_EVERY, Scene, rows_of
from cluster.metric_log import MEASURED
from cluster.recovery import incidents


def judge(scene: Scene, undisturbed: Path, database: Path) -> dict[str, Any]:
    """What became of the run, compared with the one that nothing befell."""
    mine, its = _numbers(scene.folder), _numbers(undisturbed)
    stored = _in_mlflow(scene.folder, database)
    sha256 = [json.loads((f / "student" / "student.json").read_text())["sha256"] for f in (scene.folder, undisturbed)]
    noted = [row for row in incidents.read(scene.folder) if row["time"] >= scene.struck]
    resumed = [row for row in noted if "step" in row]
    told = scene.told().replace(str(scene.storage), "STORAGE")
    lines = [line for line in told.splitlines() if line.startswith(f"{scene.name}: ")]
    return {
        **scene.facts,
        # Where it went on more than once: until the last time, and all that was done again.
        "recovery_s": round(resumed[-1]["time"] - scene.struck, 1) if resumed else None,
        "redone": sum(row["redone"] for row in resumed),
        "resumed": len(resumed),
        "weights_equal": sha256[0] == sha256[1],
        "metrics_lost": len(its.keys() - mine.keys()) + len(mine.keys() - stored.keys()),
        "metrics_doubled": sum(len(values) > 1 for values in stored.values()) + _doubled(scene.folder),
        "metrics_changed": sum(
            value != its.get(place) for place, value in mine.items() if not place[0].startswith(MEASURED)
        )
        + sum(mine.get(place) != value for place, values in stored.items() for value in values),
        "line": lines[-1] if lines else "",
        "log": lines,
    }


def _numbers(folder: Path) -> dict[tuple[str, int], float]:
    return {(key, row["s"]): value for row in rows_of(folder) for key, value in row["m"].items()}


def _doubled(folder: Path) -> int:
    """Numbers that a run's own log holds more than once."""
    return sum(len(row["m"]) for row in rows_of(folder)) - len(_numbers(folder))


def _in_mlflow(folder: Path, database: Path) -> dict[tuple[str, int], list[float]]:
    """What MLflow's database holds of each of a run's metrics: one value, if all is well; not the machine's load."""
    run = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    query = "select key, step, value from metrics where run_uuid = ? and key not like 'system/%'"
    found: dict[tuple[str, int], list[float]] = {}
    with sqlite3.connect(database) as connection:
        for key, step, value in connection.execute(query, (run,)):
            found.setdefault((key, step), []).append(value)
    return found


def good(found: dict[str, Any]) -> bool:
    """Whether all that is promised held."""
    wrong = found["metrics_lost"] + found["metrics_doubled"] + found["metrics_changed"]
    told = found["recovery_s"] is not None and bool(found["line"])
    return found["weights_equal"] and not wrong and found["redone"] <= SAVE_EVERY and told
