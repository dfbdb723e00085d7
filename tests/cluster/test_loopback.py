"""A local run's servers are reached from this machine alone."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.commands import ROOT

SCRIPT = """
import json, sys
import psutil, ray
from cluster.driver import ray_started

@ray.remote
def worker():
    return ray.util.get_node_ip_address()

with ray_started():
    address = ray.get(worker.remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [
        [process.name(), connection.laddr.ip, connection.laddr.port]
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
print(json.dumps({"address": address, "listening": found}))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """For Ray's sockets, whose names are short."""
    folder = Path(tempfile.mkdtemp(prefix="minnow"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def listening(home: Path, **environment: str) -> tuple[str, list[list[object]]]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_TMPDIR": str(home), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"} | environment
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["address"], found["listening"]


@pytest.mark.cluster
def test_a_local_ray_listens_on_loopback_alone(home: Path) -> None:
    address, found = listening(home)
    assert address == "127.0.0.1"
    assert {name for name, _, _ in found} >= {"gcs_server", "raylet"}
    assert [entry for entry in found if entry[1] not in ("127.0.0.1", "::1")] == []
