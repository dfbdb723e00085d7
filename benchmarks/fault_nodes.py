"""Nodes come and go: a Ray cluster of several raylets on this machine, each with all its processes a node of its own.

It is on loopback, with token authentication, and ends only processes that it started: never `ray stop`."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.fault_scene import PATIENCE, STEPS, WORKERS, Scene

LOOPBACK = "127.0.0.1"
RAY = str(Path(sys.executable).with_name("ray"))
NOTICE = 20
"""Seconds between a preemption's notice and the end of the node."""
LIST = """import json, ray
ray.init(log_to_driver=False)
print(json.dumps({node["NodeName"]: node["NodeID"] for node in ray.nodes()}))"""


class Nodes:
    """A head without room for workers, and nodes by name with room for one each."""

    def __init__(self, home: Path) -> None:
        self._home, self._nodes = home, dict[str, subprocess.Popen[bytes]]()
        (home / "token").write_text(secrets.token_hex(32))
        self.ports = _free_ports(3)
        self.address = f"{LOOPBACK}:{self.ports[0]}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_TMPDIR": str(home),
            "RAY_ADDRESS": self.address,
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }

    def start_head(self) -> None:
        """`ray start --head`, on the same port each time."""
        gcs, dashboard, client = self.ports
        words = ["--head", f"--port={gcs}", "--num-cpus=0", f"--dashboard-host={LOOPBACK}"]
        words += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={self._home}"]
        self._start("head", words)

    def start(self, name: str) -> None:
        """A node with room for one worker."""
        self._start(name, [f"--address={self.address}", "--num-cpus=1"])

    def kill(self, name: str) -> None:
        """SIGKILL of a node's raylet and all its processes at one time."""
        process = self._nodes.pop(name)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            if each.is_running():
                each.kill()
        process.wait()

    def kill_all(self) -> None:
        """The head last."""
        for name in sorted(self._nodes, key=lambda name: name == "head"):
            self.kill(name)

    def of(self, process: int) -> str:
        """The node that a process is on."""
        for name, node in self._nodes.items():
            if process in [each.pid for each in psutil.Process(node.pid).children(recursive=True)]:
                return name
        raise LookupError(f"process {process} is on none of {sorted(self._nodes)}")

    def drain(self, name: str) -> None:
        """Give notice of a preemption, as an autoscaler does."""
        listed = subprocess.run([sys.executable, "-c", LIST], env=self.environment, capture_output=True, check=True)
        node = json.loads(listed.stdout.splitlines()[-1])[name]
        words = ["drain-node", "--address", self.address, "--node-id", node]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(NOTICE)]
        subprocess.run([RAY, *words], env=self.environment, capture_output=True, check=True)

    def _start(self, name: str, words: list[str]) -> None:
        log = self._home / f"{name}.{time.monotonic_ns()}.log"
        common = ["--block", f"--node-ip-address={LOOPBACK}", f"--node-name={name}", "--disable-usage-stats"]
        common += ["--object-store-memory=100000000"]
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        with log.open("wb") as out:
            self._nodes[name] = subprocess.Popen(
                [RAY, "start", *words, *common], stdout=out, stderr=out, env=environment, start_new_session=True
            )
        until = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text():
            assert self._nodes[name].poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)


@contextmanager
def cluster(scene: Scene) -> Iterator[Nodes]:
    """A head and two nodes for the scene's run, for the time inside."""
    home = Path(tempfile.mkdtemp(prefix="minnow"))  # short: the sockets in it have names of at most 107 bytes
    nodes = Nodes(home)
    try:
        nodes.start_head()
        for number in range(WORKERS):
            nodes.start(f"node{number}")
        scene.environment = {k: v for k, v in nodes.environment.items() if k.startswith("RAY_")}
        yield nodes
    finally:
        nodes.kill_all()
        shutil.rmtree(home, ignore_errors=True)


def node(scene: Scene) -> None:
    """Loss of a node: SIGKILL of its raylet and all its processes. Another takes its place."""
    with cluster(scene) as nodes:
        lose_node(scene, nodes.of, nodes.kill, lambda name: nodes.start(f"{name}b"))


def lose_node(
    scene: Scene, of: Callable[[int], str], lose: Callable[[str], None], replace: Callable[[str], None]
) -> None:
    """A node is lost at a drawn moment and replaced; hosts of their own may lose it by another way (a link that goes
    down). `of`: the node of a process; `lose` and `replace` take its name."""
    scene.start()
    scene.await_moment()
    name = of(scene.sign(scene.random.randrange(WORKERS))["process"])
    scene.facts["victim"] = name
    scene.strike(lambda: lose(name))
    replace(name)
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
        for number in range(WORKERS):
            nodes.start(f"node{number}")
        scene.start()
        scene.facts["code"] = scene.end()


def preemption(scene: Scene) -> None:
    """Notice that a node is taken away soon, then its loss; another takes its place."""
    scene.settings = (*scene.settings, "resources.notice_every=1", f"optim.steps={STEPS}")
    with cluster(scene) as nodes:
        scene.start()
        scene.await_moment(("training",))
        name = nodes.of(scene.sign(scene.random.randrange(WORKERS))["process"])
        scene.facts["victim"] = name
        nodes.start("spare")
        scene.strike(lambda: nodes.drain(name))
        gone = scene.struck + NOTICE
        scene.wait(lambda: "is to be taken away" in scene.told())
        scene.wait(lambda: time.time() > gone or scene.finished, ended=True)
        if not scene.finished:
            nodes.kill(name)
        scene.facts["code"] = scene.end()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((LOOPBACK, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
