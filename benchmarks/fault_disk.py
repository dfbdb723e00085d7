"""The disk of the checkpoints is full: a small file system of memory on the run's folder, which needs the right to
mount one."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fault_scene import PATIENCE, SAVE_EVERY, STEPS, Scene

SIZE = "64m"
HELD = 3.0
"""Seconds that the disk stays full after the run has said so."""


class NotPermitted(RuntimeError):
    """This machine does not allow what the fault needs."""


@contextmanager
def small_disk(scene: Scene) -> Iterator[None]:
    """A file system of `SIZE` at the run's folder for the time inside; its files are copied below it at the end."""
    folder = scene.folder
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise NotPermitted(f"mounting a tmpfs: {mounted.stderr.strip()}")
    try:
        yield
        subprocess.run(["cp", "-a", f"{folder}/.", str(folder.with_name(f"{folder.name}.kept"))], check=True)
    finally:
        scene.close()
        _unmount(folder)
    folder.rmdir()
    folder.with_name(f"{folder.name}.kept").rename(folder)


def _unmount(folder: Path) -> None:
    """Processes of the run may be ending yet."""
    until = time.monotonic() + PATIENCE
    while subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
        assert time.monotonic() < until, f"{folder} is in use"
        time.sleep(0.2)


def disk_full(scene: Scene) -> None:
    """The checkpoints' disk fills up before a checkpoint; a while later there is room again."""
    with small_disk(scene):
        scene.start()
        step = scene.random.choice(range(SAVE_EVERY, STEPS - SAVE_EVERY))
        scene.facts |= {"moment": "training", "step": step, "victim": "the run's disk"}
        scene.wait(lambda: scene.stepped() >= step, every=0.02)
        filler = scene.folder / "filler"
        scene.strike(lambda: _fill(filler))
        scene.wait(lambda: "no room for" in scene.told())
        time.sleep(HELD)
        filler.unlink()
        freed = time.time()
        scene.wait(lambda: "there is room" in scene.told())
        scene.facts["recovery_s"] = round(time.time() - freed, 1)
        scene.facts["code"] = scene.end()


def _fill(path: Path) -> None:
    """Take all that is free."""
    with path.open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    os.write(file.fileno(), bytes(block))
            except OSError:
                continue
