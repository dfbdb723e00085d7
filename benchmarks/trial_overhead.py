"""What a trial of a search costs beyond its training: processor, wall and processes, beside the plain `cluster.train`.

A short recipe by `cluster.train`, and by searches of one and of several trials one after another, without ASHA (a
trial's process takes the next trial) and with it (each has its own); data are packed and the cache is filled before. A
trial's own cost is what each further trial adds; the rest is the search's. Processes are looked at four times a second,
so that the last moments of each are missed, on all sides alike. Nothing is learnt (no trial is better than another, and
ASHA stops none).

    python -m benchmarks.trial_overhead
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from cluster.terminal import table
from data_sharding.datasets import digits
from data_sharding.files import write_atomically
from kd import student
from kd.backbones import mobilenetv2
from kd.detectors import fcos

ROOT = Path(__file__).parent.parent
EVERY = 0.25
SPACE = "keys: {distill.scalekd.alpha: {uniform: [1.0e-4, 1.1e-4]}}\n"
SMALL = (
    "data.train=24", "data.val=8", "data.image_size=128", "data.digit_size=[8,28]", "optim.batch=4", "optim.warmup=1",
    "optim.lr=1e-12",
    "evaluation.batch=4", "evaluation.every=5", "resources.threads=1", "resources.checkpoint_every=1000",
    'student={"name":"fcos","backbone":{"name":"mobilenetv2","width_mult":0.25,"norm":"group"},"width":32,'
    '"head_depth":1,"levels":[3,4,5]}',
    'distill={"scalekd":{"start":0.0,"beta":0.0,"gamma":0.0,"sdf":{"width":16,"token_width":16}}}',
)  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "trial_overhead.json")
    parser.add_argument("--show", action="store_true", help="print what is stored")
    options = parser.parse_args()
    if not options.show:
        with TemporaryDirectory(prefix="minnow_overhead_") as folder:
            runs = measured(Path(folder), options.steps, options.trials)
        content = {"steps": options.steps, "trials": options.trials, "cores": os.cpu_count(), "runs": runs}
        write_atomically(options.results, (json.dumps(content, indent=1) + "\n").encode())
    report(json.loads(options.results.read_text()))


def measured(folder: Path, steps: int, trials: int) -> dict[str, Any]:
    """Each command with its cost; the first one, which packs and caches, is not told."""
    (folder / "space.yaml").write_text(SPACE)
    config = fcos.Config(
        backbone=mobilenetv2.Config(width_mult=0.25, norm="group"), width=32, head_depth=1, levels=(3, 4, 5)
    )
    categories = digits.categories(digits.Config())
    torch.manual_seed(7)
    teacher = student.save(fcos.build(config, len(categories)), config, categories, folder / "teacher")
    recipe = [*SMALL, f"optim.steps={steps}", f"storage={folder}", f"teachers.0.weights={teacher}"]
    recipe += ["teachers.0.min_ap=0", "teachers.0.gate_images=4"]
    train = [sys.executable, "-m", "cluster.train", "digits_scalekd", *recipe]
    watched([*train, "name=first"], folder)
    found = {"train": watched([*train, "name=plain"], folder)}
    for stopping in ("none", "asha"):
        for count in (1, trials):
            found[f"{stopping} {count}"] = watched(
                [sys.executable, "-m", "tuning.search", "digits_scalekd", str(folder / "space.yaml"), *recipe,
                 f"search.name={stopping}{count}", f"search.trials={count}", f"search.stopping={stopping}",
                 "search.objectives=[AP]", "search.seeds=1", "search.searcher=random", "search.at_once=1",
                 "search.warmup=own"], folder)  # fmt: skip
    return found


def watched(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a command to its end: seconds by the clock and of all its processes, and these by name."""
    seen: dict[tuple[int, float], tuple[str, float]] = {}
    began = time.perf_counter()
    with (folder / "log").open("ab") as log:
        driver = psutil.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while driver.poll() is None:
            for process in _family(driver):
                _look(process, seen)
            time.sleep(EVERY)
    if driver.returncode:
        raise subprocess.CalledProcessError(driver.returncode, words, (folder / "log").read_text())
    wall, processes = time.perf_counter() - began, dict[str, dict[str, float]]()
    for name, spent in sorted(seen.values()):
        one = processes.setdefault(name, {"count": 0, "seconds": 0.0})
        one["count"] += 1
        one["seconds"] += round(spent, 2)
    return {"wall": wall, "processor": sum(one["seconds"] for one in processes.values()), "processes": processes}


def _family(driver: psutil.Popen) -> list[psutil.Process]:
    try:
        return [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _look(process: psutil.Process, seen: dict[tuple[int, float], tuple[str, float]]) -> None:
    try:
        words, times = process.cmdline(), process.cpu_times()
        key = (process.pid, process.create_time())
    except psutil.Error:  # it ended while we looked
        return
    spent = times.user + times.system
    if words:
        # Ray renames a process to its actor once it has one: the last name that did something counts.
        name = words[0].split("(")[0] if words[0].startswith("ray::") else _short(words)
        seen[key] = (seen[key][0] if key in seen and name == "ray::IDLE" else name, spent)


def _short(words: list[str]) -> str:
    """`driver`, or a daemon of Ray by its file."""
    if "-m" in words[:3]:
        return "driver"
    known = [word for word in words[:4] if word.endswith((".py", "gcs_server", "raylet"))]
    return Path(known[0]).stem if known else Path(words[0]).name


def report(content: Mapping[str, Any]) -> None:
    """The table: commands, and what a further trial adds."""
    runs, more = content["runs"], content["trials"] - 1
    rows = [_row(name, run["wall"], run["processor"], _processes(run)) for name, run in runs.items()]
    for stopping in ("none", "asha"):
        one, all_ = runs[f"{stopping} 1"], runs[f"{stopping} {content['trials']}"]
        added = [(f(all_) - f(one)) / more for f in (lambda r: r["wall"], lambda r: r["processor"], _processes)]
        rows.append(_row(f"a further trial, {stopping}", *added))
    table(f"{content['steps']} steps on {content['cores']} cores, seconds", rows, left=True)


def _processes(run: Mapping[str, Any]) -> float:
    return sum(one["count"] for one in run["processes"].values())


def _row(name: str, wall: float, processor: float, processes: float) -> dict[str, object]:
    return {"run": name, "wall": f"{wall:.1f}", "processor": f"{processor:.1f}", "processes": f"{processes:.1f}"}


if __name__ == "__main__":
    main()
