"""A run with `resources.workers=[1, 2]` loses a node, goes on with the other, and takes in a new one at a checkpoint:
the same batches in the same order, and the undisturbed run's losses to rounding."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fault_cluster import cluster
from benchmarks.fault_scene import SAVE_EVERY, Scene, rows_of
from cluster.metric_log import STEPPED
from cluster.recovery import incidents

STEPS = 24


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["s"], row["m"][STEPPED]) for row in rows_of(folder) if STEPPED in row["m"]]


@pytest.mark.faults
def test_a_run_goes_on_with_fewer_workers_and_grows_again(tmp_path: Path) -> None:
    settings = (f"optim.steps={STEPS}", "evaluation.every=0", "resources.workers=[1,2]")
    scene = Scene(storage=tmp_path, name="elastic", seed=1, settings=settings)
    with cluster(scene) as nodes:
        fixed = replace(scene, name="undisturbed", settings=(*settings[:2], "resources.workers=2"))
        fixed.start()
        assert fixed.end() == 0, fixed.told()

        scene.start()
        scene.wait(lambda: scene.stepped() > SAVE_EVERY)
        lost = nodes.of(scene.sign(1)["process"])
        scene.strike(lambda: nodes.kill(lost))
        scene.wait(lambda: "with 1 worker" in scene.told())
        reached = scene.stepped()
        scene.wait(lambda: scene.stepped() > reached)
        # Held while the node starts: a few steps may be done sooner than that.
        worker = scene.sign(0)["process"]
        os.kill(worker, signal.SIGSTOP)
        assert scene.stepped() < STEPS - SAVE_EVERY, "too few steps to test anything"
        nodes.add()
        os.kill(worker, signal.SIGCONT)
        scene.wait(lambda: "a node has joined; the 1 worker(s) stop at step" in scene.told())
        assert scene.end() == 0, scene.told()

    assert [row["workers"] for row in incidents.read(scene.folder) if "workers" in row] == [1, 2]
    grown = [row for row in incidents.read(scene.folder) if row.get("workers") == 2]
    assert [row["redone"] for row in grown] == [0], "workers that leave after a checkpoint do nothing again"
    mine, its = losses_of(scene.folder), losses_of(fixed.folder)
    assert [step for step, _ in mine] == list(range(STEPS))
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in its], rel=1e-4)
