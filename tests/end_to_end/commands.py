"""Runs the project's own commands the way a user does, on a recipe small enough for a test."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from data_sharding.datasets import digits
from kd import student
from kd.backbones.mobilenetv2 import Config as MobileNet
from kd.detectors import fcos

ROOT = Path(__file__).parents[2]
SMALL_DATA = ["data.train=24", "data.val=8", "data.image_size=128", "data.digit_size=[8,28]"]
SMALL_STUDENT = [
    'student={"name":"fcos","backbone":{"name":"mobilenetv2","width_mult":0.25,"norm":"group"},"width":32,'
    '"head_depth":1,"levels":[3,4,5]}',
    "optim.batch=4",
    "optim.warmup=1",
    "evaluation.every=0",
    "evaluation.batch=4",
    "resources.threads=1",
]


def command(verb: str, recipe: str, *settings: str) -> list[str]:
    """The words of `python -m cluster.<verb> <recipe> ...` on the small data and student."""
    return [sys.executable, "-m", f"cluster.{verb}", recipe, *SMALL_DATA, *SMALL_STUDENT, *settings]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in the project's root, a process group of its own, its output in `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            words, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def run(words: list[str], log: Path) -> int:
    """Run a command to its end; its exit code."""
    return start(words, log).wait(timeout=400)


def save_teacher(folder: Path) -> Path:
    """A teacher that knows the digits' classes and nothing else: what a run needs to be driven, not to learn."""
    config = fcos.Config(backbone=MobileNet(width_mult=0.25, norm="group"), width=32, head_depth=1, levels=(3, 4, 5))
    torch.manual_seed(7)
    categories = digits.categories(digits.Config())
    return student.save(fcos.build(config, len(categories)), config, categories, folder)
