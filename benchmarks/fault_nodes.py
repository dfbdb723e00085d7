"""Nodes are lost, or are about to be, and others take their place; the head dies with all of them."""

import time
from collections.abc import Callable

from benchmarks.fault_cluster import Nodes, cluster
from benchmarks.fault_scene import STEPS, WORKERS, Scene
from benchmarks.fault_wires import wired
from cluster.recovery import incidents

NOTICE = 120
"""Seconds that a preemption's notice promises: what the clouds give. The node is gone sooner, as it may be there."""
HEARD = 3.0
"""Seconds after which Ray Train has seen the notice: it looks every 2."""


def node(scene: Scene) -> None:
    """Loss of a node: SIGKILL of its raylet and all its processes. Another takes its place."""
    with cluster(scene, standing=scene.standing) as nodes:
        _lose(scene, nodes, nodes.kill)


def link(scene: Scene) -> None:
    """Loss of a node: its link goes down, its processes live. Another takes its place."""
    with wired() as wires, cluster(scene, wires=wires) as nodes:
        _lose(scene, nodes, wires.cut)


def _lose(scene: Scene, nodes: Nodes, lose: Callable[[str], None]) -> None:
    """A node is lost at a drawn moment and replaced."""
    scene.start()
    scene.await_moment()
    rank = scene.random.randrange(WORKERS)
    name = nodes.of(scene.sign(rank)["process"])
    scene.facts["victim"] = f"the node of rank {rank}"
    scene.strike(lambda: lose(name))
    nodes.add()
    scene.facts["code"] = scene.end()


def head(scene: Scene) -> None:
    """The head dies with all nodes, and the cluster starts again; then the same command."""
    with cluster(scene) as nodes:
        scene.start()
        scene.await_moment()
        scene.facts["victim"] = "the head"
        scene.strike(lambda: nodes.kill("head"))
        assert scene.end() != 0  # the command cannot go on
        nodes.kill_all()
        nodes.start_head()
        nodes.add(WORKERS)
        scene.start()
        scene.facts["code"] = scene.end()


def preemption(scene: Scene) -> None:
    """Notice that a node is taken away soon, then its loss; another takes its place."""
    scene.settings = (*scene.settings, "resources.notice_every=1")
    with cluster(scene, WORKERS + 1, standing=scene.standing) as nodes:
        known = nodes.known()
        scene.start()
        scene.await_moment(("training",), last=STEPS - 5)
        rank = scene.random.randrange(WORKERS)
        name = nodes.of(scene.sign(rank)["process"])
        scene.facts["victim"] = f"the node of rank {rank}"
        # The run is shorter than it takes to give notice: it stands still meanwhile.
        with scene.held():
            scene.strike(lambda: nodes.drain(known[name], NOTICE))
            time.sleep(HEARD)
        scene.wait(lambda: _answered(scene))
        time.sleep(scene.random.random())
        scene.strike(lambda: nodes.kill(name))
        scene.facts["code"] = scene.end()


def _answered(scene: Scene) -> bool:
    """Whether the run has done what it does about a notice."""
    return any("is to be taken away" in row.get("now", "") for row in incidents.read(scene.folder))
