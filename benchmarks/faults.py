"""Whatever dies, the run ends in the same weights: every fault several times, at moments drawn by chance.

`python -m benchmarks.faults` writes the table draw by draw to benchmarks/results/faults.json and goes on where it was;
`--draws 1 --only worker,driver` is a quick look, `--show` prints what is stored. A draw takes one to a few minutes."""

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from benchmarks import fault_disk, fault_kinds, fault_nodes, fault_scene, fault_tracking
from benchmarks.fault_cluster import Standing
from benchmarks.fault_disk import NotPermitted
from benchmarks.fault_judge import good, judge
from benchmarks.fault_scene import Missed, Scene
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
    "link": fault_nodes.link,
    "head": fault_nodes.head,
    "preemption": fault_nodes.preemption,
}
"""By name; each function's first line says what it is."""
ATTEMPTS = 3
"""So often a draw that hit no step is drawn again."""


def draw(name: str, number: int, storage: Path, standing: Standing) -> dict[str, Any]:
    """One draw; what became of it. `storage` is shared by draws and may be empty; so is the cluster."""
    undisturbed = undisturbed_run(storage)
    missed: list[str] = []
    for attempt in range(ATTEMPTS):
        seed = sum(name.encode()) * 1000 + number + attempt * 100_000
        scene = Scene(
            storage=storage,
            name=f"{name}-{number}" + (f"-{attempt}" if attempt else ""),
            seed=seed,
            standing=standing,
        )
        try:
            return {"method": name, "seed": number, **_found(scene, name, undisturbed), "missed": missed}
        except Missed as error:
            missed.append(str(error))
        except NotPermitted as error:
            return {"method": name, "seed": number, "not_permitted": str(error)}
        finally:
            scene.close()
            scene.sockets.cleanup()
    return {"method": name, "seed": number, "failed": f"hit no step in {ATTEMPTS} attempts", "missed": missed}


def _found(scene: Scene, name: str, undisturbed: Path) -> dict[str, Any]:
    """What became of a run that is struck."""
    # Of a draw that was itself cut off.
    shutil.rmtree(scene.folder, ignore_errors=True)
    scene.log.unlink(missing_ok=True)
    try:
        FAULTS[name](scene)
        code = scene.facts.pop("code") if "code" in scene.facts else scene.end()
    except (AssertionError, subprocess.SubprocessError, psutil.Error, LookupError) as error:
        return {"failed": f"{error!r:.500}; {scene.told()[-2000:]}", **scene.facts}
    if code or not scene.finished:
        return {"failed": scene.told()[-2000:], **scene.facts}
    database = Path(scene.facts.pop("database", scene.storage / "mlflow.db"))
    found = judge(scene, undisturbed, database) | scene.facts
    return {**found, "good": good(found)}


def undisturbed_run(storage: Path) -> Path:
    """The folder of the run that nothing befalls, made once per storage."""
    scene = Scene(storage=storage, name="undisturbed", seed=0)
    if not scene.finished:
        scene.start()
        assert scene.end() == 0, scene.told()
    return scene.folder


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
        "metrics_lost": sum(r["metrics_lost"] for r in ran) if ran else None,
        "doubled_or_changed": sum(r["metrics_doubled"] + r["metrics_changed"] for r in ran) if ran else None,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--draws", type=int, default=10, help="of each fault")
    parser.add_argument("--only", default=",".join(FAULTS), help="faults, by commas")
    parser.add_argument("--storage", type=Path, help="a folder for the runs; else a temporary one")
    parser.add_argument("--show", action="store_true", help="print what is stored and end")
    options = parser.parse_args()
    # A draw's run and cluster are sessions of their own: they end with this command, however it is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    with closing(Standing()) as standing:
        for number, name in ((number, name) for number in range(draws) for name in names):
            if store.row(name, number) is None:
                found = draw(name, number, storage, standing)
                store.add(found)
                told = found.get("good", found.get("not_permitted", f"FAILED: {found.get('failed')}"))
                sys.stderr.write(f"{name} {number}: {told} {found.get('recovery_s', '')}\n")


if __name__ == "__main__":
    sys.exit(main())
