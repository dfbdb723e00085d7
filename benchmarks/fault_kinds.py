"""What can befall a run, each a function that strikes a scene at a drawn moment and leaves it to recover.

They need one machine and no rights; those that need more are in `fault_disk`, `fault_tracking` and `fault_nodes`."""

import os
import signal
import time
from pathlib import Path

from benchmarks.fault_scene import SAVE_EVERY, STEPS, WORKERS, Missed, Scene
from cluster.recovery import whole

HANG_AFTER = 120
"""Seconds, for runs whose workers hang on purpose: longer than a starved machine takes for anything."""


def worker(scene: Scene) -> None:
    """SIGKILL of a worker."""
    scene.start()
    scene.await_moment()
    rank = scene.random.randrange(WORKERS)
    scene.facts["victim"] = f"rank {rank}"
    scene.strike(lambda: _kill(scene, rank))


def all_workers(scene: Scene) -> None:
    """SIGKILL of all workers of a node."""
    scene.start()
    scene.await_moment()
    scene.facts["victim"] = "all ranks"

    def strike() -> None:
        for rank in range(WORKERS):
            _kill(scene, rank)

    scene.strike(strike)


def driver(scene: Scene) -> None:
    """SIGKILL of the driver, and at once the same command."""
    scene.start()
    scene.await_moment()
    scene.facts["victim"] = "the driver"
    assert scene.driver is not None
    scene.strike(scene.driver.kill)
    scene.driver.wait()
    scene.start()


def half_written(scene: Scene) -> None:
    """SIGKILL of everything while a checkpoint is written, of which half a file is left; then the same command."""
    scene.start()
    step = scene.random.choice(range(SAVE_EVERY - 1, STEPS - 1, SAVE_EVERY))
    scene.facts |= {"moment": "saving", "step": step}
    scene.wait(lambda: scene.does("saving", step), every=0.005)
    # At once, or when the first byte of it is there.
    early = scene.random.random() < 0.25
    scene.wait(lambda: early or bool(_written(scene)) or not scene.does("saving", step), every=0.002)
    if not scene.does("saving", step):
        raise Missed("the checkpoint was whole sooner than anybody could look")
    scene.strike(scene.kill_group)
    scene.facts["victim"] = _halve(scene)
    scene.start()


def hang(scene: Scene) -> None:
    """SIGSTOP of a worker: it lives and does nothing more."""
    scene.settings = (*scene.settings, f"resources.hang_after={HANG_AFTER}")
    scene.start()
    scene.await_moment()
    rank = scene.random.randrange(WORKERS)
    scene.facts["victim"] = f"rank {rank}"
    scene.strike(lambda: os.kill(scene.sign(rank)["process"], signal.SIGSTOP))
    scene.wait(lambda: f"rank {rank} hangs" in scene.told())


def _kill(scene: Scene, rank: int) -> None:
    os.kill(scene.sign(rank)["process"], signal.SIGKILL)


def _halve(scene: Scene) -> str:
    """Leave the checkpoint of the moment as a kill in its middle does, wherever the kill came; which file is cut."""
    written = _written(scene)
    if not written:  # the kill came before its first byte
        copy = scene.folder / "train" / f"checkpoint_{time.strftime('%Y-%m-%d_%H-%M-%S')}.000000"
        copy.mkdir(parents=True)
        (copy / "engine_00000.pt").write_bytes(b"half")
        return "engine_00000.pt, alone"
    newest = max(written)
    files = sorted(path for path in newest.iterdir() if path.is_file())
    cut = scene.random.choice(files) if files else newest / "engine_00000.pt"
    _cut(cut)
    return cut.name


def _written(scene: Scene) -> set[Path]:
    """The checkpoint of the moment, as far as it is there."""
    steps = (scene.facts["step"] + 1, None)
    return {path for path in (scene.folder / "train").glob("checkpoint_*") if whole.steps_of(path) in steps}


def _cut(path: Path) -> None:
    content = path.read_bytes() if path.exists() else b"half"
    path.write_bytes(content[: len(content) // 2])
