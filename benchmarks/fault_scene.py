"""One draw of one fault: a small run by the user's own command, a moment to strike at, and what must then hold.

The digits of the demo at a few steps, ScaleKD's assistant, averaged weights and ZeRO 2 on two workers: all that a
checkpoint holds."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from cluster.metric_log import STEPPED
from data_sharding.datasets import digits
from kd import student
from kd.backbones.mobilenetv2 import Config as MobileNet
from kd.detectors import fcos

if TYPE_CHECKING:
    from benchmarks.fault_cluster import Standing

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


class Missed(RuntimeError):
    """The fault hit no step: such a draw counts as not run."""


@dataclass
class Scene:
    """A run in `storage`, and a source of chance that is its own."""

    storage: Path
    name: str
    seed: int
    settings: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """Beside this process's own."""
    prefix: tuple[str, ...] = ()
    """Words before the command: where it is given."""
    standing: "Standing | None" = None
    """A cluster that outlasts the scene, for faults that need one."""
    driver: subprocess.Popen[bytes] | None = None
    struck: float = 0.0
    """When, in seconds since the epoch."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Where, when and what was struck."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        # Ray's own folder. Short: the sockets in it have names of at most 107 bytes.
        self.sockets = tempfile.TemporaryDirectory(prefix="minnow", ignore_cleanup_errors=True)

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
        words = [*self.prefix, sys.executable, "-m", "cluster.train", *_overlaid([*RECIPE, *own])]
        temporary = self.storage / "tmp"
        temporary.mkdir(exist_ok=True)
        places = {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "RAY_TMPDIR": self.sockets.name}
        environment = os.environ | places | self.environment
        with self.log.open("ab") as out:
            self.driver = subprocess.Popen(
                words, cwd=ROOT, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def end(self) -> int:
        """Wait for the command; its exit code."""
        assert self.driver is not None
        return self.driver.wait(timeout=PATIENCE)

    def wait(self, happened: Callable[[], bool], *, ended: bool = False, every: float = 0.1) -> None:
        """Until something has happened, looking `every` so many seconds. AssertionError where the run ends before
        (unless it may: `ended`); Missed where it ends well and nothing has struck it yet."""
        until = time.monotonic() + PATIENCE
        while not happened():
            over = self.driver is not None and self.driver.poll() is not None
            if over and self.finished and not self.struck:
                raise Missed("the run was over")
            assert ended or not over, self.told()
            assert time.monotonic() < until, self.told()
            time.sleep(every)

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

    def await_moment(
        self, moments: tuple[str, ...] = ("training", "saving", "evaluating"), last: int = STEPS - 1
    ) -> None:
        """Wait for a moment that is drawn: what the workers do, at which step (training: before `last`), and how far
        into it."""
        what = self.random.choice(moments)
        steps = {
            "training": range(2, last),
            "saving": range(SAVE_EVERY - 1, STEPS - 1, SAVE_EVERY),
            "evaluating": range(EVALUATE_EVERY - 1, STEPS - 1, EVALUATE_EVERY),
        }[what]
        step, share = self.random.choice(steps), self.random.random()
        if what == "training":
            self.wait(lambda: self.stepped() >= step, every=0.02)
        else:
            self.wait(lambda: self.does(what, step), every=0.005)
        time.sleep(share * (0.3 if what == "training" else 0.1))
        self.facts |= {"moment": what, "step": step}

    def does(self, what: str, step: int) -> bool:
        """Whether rank 0 does this now, at this step."""
        sign = self.sign(0)
        return (sign.get("doing"), sign.get("step")) == (what, step)

    @contextmanager
    def held(self) -> Iterator[None]:
        """All workers stand still inside: what is done there takes none of the run's time."""
        workers = [self.sign(rank)["process"] for rank in range(WORKERS)]
        for process in workers:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in workers:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    def strike(self, act: Callable[[], None]) -> None:
        """Do it, and remember when."""
        if self.finished:
            raise Missed("the run was over")
        # Recovery is as fast as the machine is free.
        self.struck, self.facts["load"] = time.time(), round(os.getloadavg()[0], 1)
        act()

    def close(self) -> None:
        """Leave nothing of it running."""
        if self.driver is not None and self.driver.poll() is None:
            self.kill_group()

    def kill_group(self) -> None:
        """SIGKILL of the command and all processes that it started, whatever group they are in."""
        assert self.driver is not None
        family = psutil.Process(self.driver.pid).children(recursive=True)
        os.killpg(self.driver.pid, signal.SIGKILL)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.driver.wait()
        while any(map(_lives, family)):
            time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


def _overlaid(settings: list[str]) -> list[str]:
    """The last word on each key: a command refuses one that is set twice."""
    return list({word.partition("=")[0]: word for word in settings}.values())
