"""The tracking server is away: an MLflow server of one's own on SQLite, killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fault_scene import PATIENCE, Scene

LOOPBACK = "127.0.0.1"
OUTAGE = 60.0
"""Seconds that the server is away."""
KEPT = "the same command again hands them over"
CLIENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Server:
    """`mlflow server` on a database in `folder`; the port stays when it starts again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, None
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            self._port = probe.getsockname()[1]

    @property
    def uri(self) -> str:
        return f"http://{LOOPBACK}:{self._port}"

    def start(self) -> None:
        """Return when it answers."""
        words = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(self._port)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        words += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("ab") as out:
            self._process = subprocess.Popen(
                words, stdout=out, stderr=out, env=os.environ | CLIENT, start_new_session=True
            )
        until = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL of it and its workers."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def served(scene: Scene) -> Iterator[Server]:
    """A server for the scene's run, for the time inside."""
    server = Server(scene.storage)
    server.start()
    scene.settings = (*scene.settings, f"tracking.uri={server.uri}")
    scene.facts |= {"victim": "the tracking server", "database": str(scene.storage / "server.db")}
    try:
        yield server
    finally:
        server.kill()


def tracking_away(scene: Scene) -> None:
    """The tracking server is away for a minute."""
    with served(scene) as server:
        scene.start()
        scene.await_moment()
        scene.strike(server.kill)
        before = scene.stepped()
        time.sleep(OUTAGE)
        server.start()
        scene.facts["recovery_s"] = 0.0 if scene.finished or scene.stepped() > before else None  # it never stood
        scene.facts["code"] = scene.end()
        if KEPT in scene.told():  # the run was over before the server was back, and waited no longer
            scene.start()
            scene.facts["code"] = scene.facts["code"] or scene.end()


def tracking_gone(scene: Scene) -> None:
    """The tracking server does not come back: the run ends well without it. Later the same command hands over."""
    with served(scene) as server:
        scene.start()
        scene.await_moment()
        scene.strike(server.kill)
        scene.facts["code"] = scene.end()
        scene.facts["recovery_s"] = 0.0 if KEPT in scene.told() else None
        server.start()
        scene.start()
        scene.facts["code"] = scene.facts["code"] or scene.end()
