"""A real Ray head for a test: loopback only, token authentication on, a home of its own, gone without a trace."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.fault_cluster import free_ports
from tests.end_to_end.commands import ROOT

LOOPBACK = "127.0.0.1"
PATIENCE = 400
"""Seconds that any one thing may take on a machine that is busy with something else."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head and how to talk to it."""

    address: str
    """The job server's."""
    home: Path
    """Ray's own folder: sessions, logs, unpacked code."""
    environment: Mapping[str, str]
    """With the token."""
    pid: int

    def wait_until_jobs_run(self, log: Path) -> None:
        """The job server answers a while before it has an agent to hand a job to."""
        deadline = time.monotonic() + PATIENCE
        while self._ray(["submit", "--address", self.address, "--", "true"], log).wait(timeout=PATIENCE):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)

    def submit(self, name: str, log: Path, *settings: str, token: bool = True) -> subprocess.Popen[bytes]:
        """`ray job submit ... -- python -m cluster.train ...` from the project's root, followed into `log`."""
        words = ["submit", "--address", self.address, "--submission-id", name, "--working-dir", "."]
        return self._ray([*words, "--", "python", "-m", "cluster.train", *settings], log, token=token)

    def send(self, log: Path, *settings: str) -> subprocess.Popen[bytes]:
        """The same by `python -m cluster.submit`."""
        words = [sys.executable, "-m", "cluster.submit", *settings, "--address", self.address]
        with log.open("ab") as out:
            return subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, env=dict(self.environment))

    def stop(self, name: str, log: Path) -> int:
        """`ray job stop`; its exit code."""
        return self._ray(["stop", "--address", self.address, name], log).wait(timeout=PATIENCE)

    def processes(self, word: str) -> list[psutil.Process]:
        """Those of this head's whose title holds `word`."""
        family = psutil.Process(self.pid).children(recursive=True)
        return [p for p in family if p.is_running() and word in " ".join(p.cmdline())]

    def packages(self) -> list[Path]:
        """The folders into which submitted code was unpacked."""
        return [p for p in self.home.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*") if p.is_dir()]

    def _ray(self, words: list[str], log: Path, *, token: bool = True) -> subprocess.Popen[bytes]:
        hidden = () if token else ("RAY_AUTH_TOKEN_PATH",)
        environment = {name: value for name, value in self.environment.items() if name not in hidden}
        with log.open("ab") as out:
            return subprocess.Popen([RAY, "job", *words], cwd=ROOT, stdout=out, stderr=out, env=environment)


RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def started_head(token_file: Path, cpus: int = 2) -> Iterator[Head]:
    """`ray start --head` for the time inside. Ends only processes that it started: never `ray stop`, which ends all."""
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    # Below the system's folder: the sockets in it have names of at most 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="minnow"))
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = own | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_TMPDIR": str(home),
        "HOME": str(home),  # without a token of one's own in it
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE),
    }
    gcs, dashboard, client = free_ports(3)
    words = ["start", "--head", "--block", f"--node-ip-address={LOOPBACK}", f"--port={gcs}", f"--num-cpus={cpus}"]
    words += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    words += [f"--temp-dir={home}", "--object-store-memory=100000000", "--disable-usage-stats"]
    with (home / "start.log").open("wb") as out:
        process = subprocess.Popen([RAY, *words], stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        _wait_for(dashboard, home / "start.log", process)
        head = Head(address=f"http://{LOOPBACK}:{dashboard}", home=home, environment=environment, pid=process.pid)
        head.wait_until_jobs_run(home / "ready.log")
        yield head
    finally:
        _end(process)
        shutil.rmtree(home, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def _wait_for(port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Until `ray start` says that all of it runs and the job server answers."""
    deadline = time.monotonic() + PATIENCE
    while "Ray runtime started" not in log.read_text() or not _answers(port):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
    for each in family:
        if each.is_running():
            each.kill()
    psutil.wait_procs(family, timeout=5)
