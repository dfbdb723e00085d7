"""Hosts in namespaces reach each other and nothing else, and are gone with the process that made them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster_netns.hosts import HOME, ROOT, started_hosts, wait_for, why_not

pytestmark = pytest.mark.hosts
SSH = ("ssh", "-i", f"{HOME}/.ssh/id_ed25519", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
MAKER = """
import sys, time
from pathlib import Path
from tests.cluster_netns.hosts import started_hosts
with started_hosts(Path(sys.argv[1]), ["one", "two"]) as hosts:
    Path(sys.argv[2]).write_text(" ".join(str(host.pid) for host in hosts.values()))
    time.sleep(600)
"""


def require_namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)


def test_hosts_log_in_on_each_other_and_cannot_change_the_machine(tmp_path: Path) -> None:
    require_namespaces()
    log = tmp_path / "log"
    with started_hosts(tmp_path / "hosts", ["one", "two"]) as hosts:
        wait_for("sshd", lambda: hosts["one"].run([*SSH, "root@two", "true"], log) == 0, log)
        said = tmp_path / "said"
        assert hosts["one"].run([*SSH, "root@two", "hostname; ls /proc | grep -c '^[0-9]*$'; pwd"], said) == 0
        name, processes, home = said.read_text().splitlines()[-3:]
        assert (name, home) == ("two", str(HOME))
        assert int(processes) < 20, "a host sees its own processes alone"
        for path in ("/etc/minnow", str(ROOT / "minnow")):
            assert hosts["two"].run(["touch", path], log) != 0
        assert hosts["two"].run(["ls", str(ROOT / "Makefile"), sys.executable], log) == 0
        assert hosts["two"].run(["touch", "/tmp/own", "/mnt/shared/all"], log) == 0
        assert (tmp_path / "hosts" / "shared" / "all").exists()
        assert not Path("/tmp/own").exists()
        pids = [host.pid for host in hosts.values()]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_nothing_is_left_of_a_test_that_was_killed(tmp_path: Path) -> None:
    require_namespaces()
    told = tmp_path / "pids"
    words = [sys.executable, "-c", MAKER, str(tmp_path / "hosts"), str(told)]
    maker = subprocess.Popen(words, cwd=ROOT)

    def made() -> bool:
        assert maker.poll() is None
        return told.exists() and told.read_text() != ""

    wait_for("two hosts", made)
    pids = [int(word) for word in told.read_text().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait()
    wait_for("their end", lambda: not any(psutil.pid_exists(pid) for pid in pids))
