"""One draw of one fault: a small run by the user's own command, a moment to strike at, and what must then hold.

The digits of the demo at a few steps, ScaleKD's assistant, averaged weights and ZeRO 2 on two workers: all that a
checkpoint holds."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.metric_log import MEASURED, STEPPED
from cluster.recovery import incidents
from data_sharding.datasets import digits
from kd import student
from kd.backbones.mobilenetv2 import Config as MobileNet
from kd.detectors import fcos

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, EVALUATE_EVERY, WORKERS = 16, 4, 6, 2
PATIENCE = 3600.0
"""Seconds that anything may take on a machine that is busy with something else."""
RECIPE = [
    "digits_scalekd",
    "data.train=24", "data.val=8", "data.image_size=128", "data.digit_size=[8,28]",
    'student={"name":"fcos","backbone":{"name":"mobilenetv2","width_mult":0.25,"norm":"group"},"width":32,'
    '"head_depth":1,"levels":[3,4,5]}',
    "teachers.0.min_ap=0", "teachers.0.gate_images=4", "teachers.0.cache=false",
    "distill.scalekd.start=0.2", 'distill.scalekd.sdf={"width":16,"token_width":16}', 'distill.scalekd.csa={"heads":2}',
    f"optim.steps={STEPS}", "optim.batch=4", "optim.warmup=1", "optim.ema=0.9",
    f"evaluation.every={EVALUATE_EVERY}", "evaluation.batch=4",
    f"resources.workers={WORKERS}", "resources.threads=1", "resources.zero=2",
    f"resources.checkpoint_every={SAVE_EVERY}",
]  # fmt: skip


@dataclass
class Scene:
    """A run in `storage`, and a source of chance that is its own."""

    storage: Path
    name: str
    seed: int
    settings: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """Beside this process's own."""
    driver: subprocess.Popen[bytes] | None = None
    struck: float = 0.0
    """When, in seconds since the epoch."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Where, when and what was struck."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    @property
    def log(self) -> Path:
        return self.storage / f"{self.name}.log"

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def start(self) -> None:
        """Give the command, or give it again."""
        teacher = teacher_of(self.storage)
        own = [f"name={self.name}", f"storage={self.storage}", f"teachers.0.weights={teacher}", *self.settings]
        words = [sys.executable, "-m", "cluster.train", *_overlaid([*RECIPE, *own])]
        temporary = self.storage / "tmp"
        temporary.mkdir(exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)} | self.environment
        with self.log.open("ab") as out:
            self.driver = subprocess.Popen(
                words, cwd=ROOT, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def end(self) -> int:
        """Wait for the command; its exit code."""
        assert self.driver is not None
        return self.driver.wait(timeout=PATIENCE)

    def wait(self, happened: Callable[[], bool], *, ended: bool = False) -> None:
        """Until something has happened. AssertionError where the run ends before (unless it may: `ended`)."""
        until = time.monotonic() + PATIENCE
        while not happened():
            assert ended or self.driver is None or self.driver.poll() is None, self.told()
            assert time.monotonic() < until, self.told()
            time.sleep(0.005)

    def told(self) -> str:
        """The command's output so far."""
        return self.log.read_text() if self.log.exists() else ""

    def sign(self, rank: int) -> Mapping[str, Any]:
        """A worker's sign of life: its process, its step, what it does."""
        try:
            return json.loads((self.folder / "pulse" / f"{rank:05d}.json").read_text())
        except (OSError, ValueError):
            return {}

    def stepped(self) -> int:
        """Steps whose metrics are written."""
        return sum(STEPPED in row["m"] for row in rows_of(self.folder))

    def await_moment(self, moments: tuple[str, ...] = ("training", "saving", "evaluating")) -> None:
        """Wait for a moment that is drawn: what the workers do, at which step, and how far into it."""
        what = self.random.choice(moments)
        steps = {
            "training": range(2, STEPS - 1),
            "saving": range(SAVE_EVERY - 1, STEPS - 1, SAVE_EVERY),
            "evaluating": range(EVALUATE_EVERY - 1, STEPS - 1, EVALUATE_EVERY),
        }[what]
        step, share = self.random.choice(steps), self.random.random()
        if what == "training":
            self.wait(lambda: self.stepped() >= step)
        else:
            self.wait(lambda: self.sign(0).get("doing") == what and self.sign(0).get("step") == step)
        time.sleep(share * (0.3 if what == "training" else 0.1))
        self.facts |= {"moment": what, "step": step}

    def strike(self, act: Callable[[], None]) -> None:
        """Do it, and remember when."""
        assert not self.finished
        self.struck = time.time()
        act()

    def kill_group(self) -> None:
        """SIGKILL of the command and all processes that it started."""
        assert self.driver is not None
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()


def teacher_of(storage: Path) -> Path:
    """A teacher that knows the digits' classes and nothing else: what a run needs to be driven, not to learn."""
    folder = storage / "weights"
    if not (folder / "student.json").exists():
        config = fcos.Config(
            backbone=MobileNet(width_mult=0.25, norm="group"), width=32, head_depth=1, levels=(3, 4, 5)
        )
        torch.manual_seed(7)
        categories = digits.categories(digits.Config())
        student.save(fcos.build(config, len(categories)), config, categories, folder)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def judge(scene: Scene, undisturbed: Path, database: Path) -> dict[str, Any]:
    """What became of the run, compared with the one that nothing befell."""
    mine, its = _numbers(scene.folder), _numbers(undisturbed)
    stored = _in_mlflow(scene.folder, database)
    sha256 = [json.loads((f / "student" / "student.json").read_text())["sha256"] for f in (scene.folder, undisturbed)]
    noted = [row for row in incidents.read(scene.folder) if row["time"] >= scene.struck]
    resumed = [row for row in noted if "step" in row]
    lines = [line for line in scene.told().splitlines() if line.startswith(f"{scene.name}: ")]
    return {
        **scene.facts,
        "recovery_s": round(resumed[0]["time"] - scene.struck, 1) if resumed else None,
        "redone": resumed[0]["redone"] if resumed else 0,
        "resumed": len(resumed),
        "weights_equal": sha256[0] == sha256[1],
        "metrics_lost": len(its.keys() - mine.keys()) + len(mine.keys() - stored.keys()),
        "metrics_doubled": sum(count > 1 for count in stored.values()) + _doubled(scene.folder),
        "metrics_changed": sum(
            value != its.get(place) for place, value in mine.items() if not place[0].startswith(MEASURED)
        ),
        "line": lines[-1] if lines else "",
        "log": lines,
    }


def _numbers(folder: Path) -> dict[tuple[str, int], float]:
    return {(key, row["s"]): value for row in rows_of(folder) for key, value in row["m"].items()}


def _doubled(folder: Path) -> int:
    """Numbers that a run's own log holds more than once."""
    return sum(len(row["m"]) for row in rows_of(folder)) - len(_numbers(folder))


def _in_mlflow(folder: Path, database: Path) -> dict[tuple[str, int], int]:
    """How often MLflow's database holds each of a run's metrics; not the machine's load."""
    run = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    query = "select key, step, count(*) from metrics where run_uuid = ? and key not like 'system/%' group by key, step"
    with sqlite3.connect(database) as connection:
        return {(key, step): count for key, step, count in connection.execute(query, (run,))}


def _overlaid(settings: list[str]) -> list[str]:
    """The last word on each key: a command refuses one that is set twice."""
    return list({word.partition("=")[0]: word for word in settings}.values())
