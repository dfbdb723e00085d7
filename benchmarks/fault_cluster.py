"""A Ray cluster of several raylets on this machine, each with all its processes a node of its own.

It is on loopback or in a network of its own (`fault_wires`), with token authentication, and ends only processes that it
started: never `ray stop`."""

import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.fault_scene import PATIENCE, WORKERS, Scene
from benchmarks.fault_wires import Wires

LOOPBACK = "127.0.0.1"
RAY = str(Path(sys.executable).with_name("ray"))
LIST = """import json, ray
ray.init(log_to_driver=False)
print(json.dumps({node["NodeName"]: node["NodeID"] for node in ray.nodes()}))"""


class Nodes:
    """A head without room for workers, and nodes by name with room for one each."""

    def __init__(self, wires: Wires | None = None) -> None:
        """Starts nothing. `wires`: the network that they are in, each at a place of its own; None: all on loopback."""
        self._wires, self._nodes, self._numbers = wires, dict[str, subprocess.Popen[bytes]](), itertools.count()
        # Short: the sockets in it have names of at most 107 bytes.
        home = self._home = Path(tempfile.mkdtemp(prefix="minnow"))
        (home / "token").write_text(secrets.token_hex(32))
        self.ports = free_ports(3)
        self.host = LOOPBACK if wires is None else wires.hub
        self.address = f"{self.host}:{self.ports[0]}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_TMPDIR": str(home),
            "RAY_ADDRESS": self.address,
            "OMP_NUM_THREADS": "1",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }

    def start_head(self) -> None:
        """`ray start --head`, on the same port each time."""
        gcs, dashboard, client = self.ports
        words = ["--head", f"--port={gcs}", "--num-cpus=0", f"--dashboard-host={LOOPBACK}"]
        words += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={self._home}"]
        self._await("head", self._begin("head", words, self.host, self._at_head()))

    def add(self, count: int = 1) -> None:
        """Nodes with room for one worker each, under names that none had before."""
        words = [f"--address={self.address}", "--num-cpus=1"]
        # One after the other: side by side on one machine some wait for ever.
        for name in [f"node{next(self._numbers)}" for _ in range(count)]:
            address, inside = LOOPBACK, ()
            if self._wires is not None:
                address, inside = self._wires.plug(name), self._wires.inside(name)
            self._await(name, self._begin(name, words, address, inside))

    def count(self) -> int:
        """Nodes with room for a worker."""
        return len(self._nodes.keys() - {"head"})

    def kill(self, name: str) -> None:
        """SIGKILL of a node's raylet and all its processes at one time."""
        process = self._nodes.pop(name)
        family = []
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()

    def kill_all(self) -> None:
        """The head last."""
        for name in sorted(self._nodes, key=lambda name: name == "head"):
            self.kill(name)

    def close(self) -> None:
        """Leave nothing of them."""
        self.kill_all()
        shutil.rmtree(self._home, ignore_errors=True)

    def of(self, process: int) -> str:
        """The node that a process is on."""
        for name, node in self._nodes.items():
            if process in [each.pid for each in psutil.Process(node.pid).children(recursive=True)]:
                return name
        raise LookupError(f"process {process} is on none of {sorted(self._nodes)}")

    def known(self) -> dict[str, str]:
        """What Ray calls the nodes."""
        return json.loads(self._asked(sys.executable, "-c", LIST).splitlines()[-1])

    def drain(self, node: str, seconds: int) -> None:
        """Give notice of a preemption in so many seconds to a node that Ray calls so, as an autoscaler does."""
        words = [RAY, "drain-node", "--address", self.address, "--node-id", node]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(seconds)]
        self._asked(*words)

    def _asked(self, *words: str) -> str:
        """What a command says where the head is."""
        asked = [*self._at_head(), *words]
        return subprocess.run(asked, env=self.environment, capture_output=True, check=True, text=True).stdout

    def _at_head(self) -> tuple[str, ...]:
        return () if self._wires is None else self._wires.inside("hub")

    def _begin(self, name: str, words: list[str], address: str, inside: tuple[str, ...]) -> Path:
        """Its log."""
        log = self._home / f"{name}.{time.monotonic_ns()}.log"
        common = ["--block", f"--node-ip-address={address}", f"--node-name={name}", "--disable-usage-stats"]
        common += ["--object-store-memory=100000000"]
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        with log.open("wb") as out:
            self._nodes[name] = subprocess.Popen(
                [*inside, RAY, "start", *words, *common],
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )
        return log

    def _await(self, name: str, log: Path) -> None:
        until = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text():
            assert self._nodes[name].poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)


@dataclass
class Standing:
    """A cluster that stays up from one draw to the next, where a fault leaves it whole; the first that needs one
    starts it."""

    wires: Wires | None = None
    nodes: Nodes | None = None

    def with_room(self, workers: int) -> Nodes:
        """With at least so many nodes."""
        if self.nodes is None:
            self.nodes = Nodes(self.wires)
            self.nodes.start_head()
        if (missing := workers - self.nodes.count()) > 0:
            self.nodes.add(missing)
        return self.nodes

    def close(self) -> None:
        """End it. The next that needs one starts another."""
        if self.nodes is not None:
            self.nodes.close()
        self.nodes = None


@contextmanager
def cluster(
    scene: Scene, workers: int = WORKERS, *, wires: Wires | None = None, standing: Standing | None = None
) -> Iterator[Nodes]:
    """A head and nodes for so many workers for the scene's run, for the time inside: `standing` is left up unless
    something goes wrong inside."""
    stands = Standing(wires) if standing is None else standing
    try:
        nodes = stands.with_room(workers)
        scene.prefix = () if wires is None else wires.inside("hub")
        scene.environment = {k: v for k, v in nodes.environment.items() if k.startswith("RAY_")}
        yield nodes
    except BaseException:
        stands.close()
        raise
    if standing is None:
        stands.close()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((LOOPBACK, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
