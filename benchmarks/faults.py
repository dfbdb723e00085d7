"""Whatever dies, the run ends in the same weights: every fault several times, at moments drawn by chance.

`python -m benchmarks.faults` writes the table draw by draw to benchmarks/results/faults.json and goes on where it was;
`--draws 1 --only worker,driver` is a quick look, `--show` prints what is stored. A draw takes one to a few minutes."""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fault_disk, fault_kinds, fault_nodes, fault_scene, fault_tracking
from benchmarks.fault_scene import Scene
from benchmarks.store import Store, fingerprint
from cluster.terminal import table

RESULTS = Path(__file__).with_name("results") / "faults.json"
FAULTS: dict[str, Callable[[Scene], None]] = {
    "worker": fault_kinds.worker,
    "driver": fault_kinds.driver,
    "half_written": fault_kinds.half_written,
    "tracking_away": fault_tracking.tracking_away,
    "hang": fault_kinds.hang,
    "all_workers": fault_kinds.all_workers,
    "disk_full": fault_disk.disk_full,
    "tracking_gone": fault_tracking.tracking_gone,
    "node": fault_nodes.node,
    "head": fault_nodes.head,
    "preemption": fault_nodes.preemption,
}
"""By name; each function's first line says what it is."""


def draw(name: str, number: int, storage: Path) -> dict[str, Any]:
    """One draw; what became of it. `storage` is shared by draws and may be empty."""
    undisturbed = undisturbed_run(storage)
    scene = Scene(storage=storage, name=f"{name}-{number}", seed=sum(name.encode()) * 1000 + number)
    try:
        FAULTS[name](scene)
        code = scene.facts.pop("code") if "code" in scene.facts else scene.end()
    except fault_disk.NotPermitted as error:
        return {"method": name, "seed": number, "not_run": str(error)}
    finally:
        _end(scene)
    if code or not scene.finished:
        return {"method": name, "seed": number, "failed": scene.told()[-2000:], **scene.facts}
    database = Path(scene.facts.pop("database", storage / "mlflow.db"))
    found = fault_scene.judge(scene, undisturbed, database) | scene.facts
    return {"method": name, "seed": number, **found, "good": good(found)}


def good(found: dict[str, Any]) -> bool:
    """Whether all that is promised held."""
    wrong = found["metrics_lost"] + found["metrics_doubled"] + found["metrics_changed"]
    told = found["recovery_s"] is not None and bool(found["line"])
    return found["weights_equal"] and not wrong and found["redone"] <= fault_scene.SAVE_EVERY and told


def undisturbed_run(storage: Path) -> Path:
    """The folder of the run that nothing befalls, made once per storage."""
    scene = Scene(storage=storage, name="undisturbed", seed=0)
    if not scene.finished:
        scene.start()
        assert scene.end() == 0, scene.told()
    return scene.folder


def _end(scene: Scene) -> None:
    """Leave nothing running of a draw that went wrong."""
    if scene.driver is not None and scene.driver.poll() is None:
        scene.kill_group()


def rows(stored: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """The table: one row per fault."""
    return [_row(name, [r for r in stored if r["method"] == name]) for name in FAULTS]


def _row(name: str, draws: list[dict[str, Any]]) -> dict[str, object]:
    ran = [r for r in draws if "weights_equal" in r]
    times = [r["recovery_s"] for r in ran if r["recovery_s"] is not None]
    return {
        "fault": (FAULTS[name].__doc__ or name).splitlines()[0].rstrip("."),
        "draws": len(ran),
        "failed": sum("failed" in r for r in draws),
        "recovery_s": statistics.median(times) if times else None,
        "worst_s": max(times, default=None),
        "most_redone": max((r["redone"] for r in ran), default=None),
        "weights_equal": f"{sum(r['weights_equal'] for r in ran)}/{len(ran)}" if ran else None,
        "metrics_lost_or_doubled": sum(r["metrics_lost"] + r["metrics_doubled"] for r in ran) if ran else None,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--draws", type=int, default=10, help="of each fault")
    parser.add_argument("--only", default=",".join(FAULTS), help="faults, by commas")
    parser.add_argument("--storage", type=Path, help="a folder for the runs; else a temporary one")
    parser.add_argument("--show", action="store_true", help="print what is stored and end")
    options = parser.parse_args()
    store = Store(RESULTS, fingerprint((fault_scene.RECIPE, "1")))
    if not options.show:
        storage = options.storage or Path(tempfile.mkdtemp(prefix="minnow_faults_"))
        storage.mkdir(parents=True, exist_ok=True)
        _draw_all(store, options.only.split(","), options.draws, storage.resolve())
        if options.storage is None:
            shutil.rmtree(storage, ignore_errors=True)
    table("faults", rows(store.read()["rows"]))
    return 0


def _draw_all(store: Store, names: Sequence[str], draws: int, storage: Path) -> None:
    for number in range(draws):
        for name in names:
            if store.row(name, number) is None:
                found = draw(name, number, storage)
                store.add(found)
                sys.stderr.write(f"{name} {number}: {found.get('good', found.get('not_run', 'FAILED'))}\n")


if __name__ == "__main__":
    sys.exit(main())
