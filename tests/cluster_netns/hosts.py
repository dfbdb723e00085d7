"""Hosts for a test's cluster, on one machine: each has its own network, processes, name, home and sshd.

They are Linux namespaces without names. The kernel ends a host with all its processes, network and mounts when the
process that made it ends, however it ends: nothing is left over after a failed or killed run, and `ray stop` inside a
host sees that host's processes alone.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BOOT = Path(__file__).with_name("boot.sh")
NETWORK = "10.77.0"
HOME, SHARED = Path("/mnt/home"), Path("/mnt/shared")
"""As the hosts see them."""
COMMANDS = ("ip", "unshare", "nsenter", "setpriv", "hostname", "ssh", "ssh-keygen", "/usr/sbin/sshd", "rsync", "make")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
UNSHARED = ("setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
PATIENCE = 600
"""Seconds that any one thing may take on a machine that is busy with something else."""
SSHD = f"""\
Port 22
HostKey {HOME}/.ssh/host_key
AuthorizedKeysFile {HOME}/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""


def why_not() -> str | None:
    """What this machine lacks for hosts of its own; None: nothing."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    words = [*UNSHARED, "sh", "-c", "mount --make-rprivate / && ip link add lan type bridge"]
    tried = subprocess.run(words, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"namespaces are not permitted here: {tried.stderr.strip()}"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A running host."""

    name: str
    address: str
    place: Path
    """Its folder on the machine: `home` and `tmp` in it are the host's, `sshd.log` tells of its log-ins."""
    pid: int
    """Of its first process, as the machine counts."""

    def start(self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start a command in the project's folder on this host, as if typed there; its output in `log`."""
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        own = {"HOME": str(HOME), "PATH": path, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"} | dict(environment or {})
        variables = [f"{name}={value}" for name, value in own.items()]
        inside = ["nsenter", "--target", str(self.pid), *NAMESPACES, "env", "-i", *variables]
        with log.open("ab") as out:
            return subprocess.Popen([*inside, *_in(ROOT, words)], stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def run(self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
        """Run a command to its end; its exit code."""
        return self.start(words, log, environment).wait(timeout=PATIENCE)

    def processes(self, word: str) -> list[psutil.Process]:
        """Those on this host whose command line holds `word`."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def started_hosts(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Hosts by name for the time inside, all in one network, which the first one's bridge is; every one of them can
    log in on every other as root with the key in its ~/.ssh. They share one folder, as over NFS."""
    (folder / "shared").mkdir(parents=True)
    keys = folder / "keys"
    keys.mkdir()
    for name in ("id_ed25519", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
    boots: list[subprocess.Popen] = []
    hosts: dict[str, Host] = {}
    try:
        for name, address in addresses.items():
            place = _furnished(folder / name, keys, addresses)
            boots.append(_booted(name, place, folder / "shared"))
            (first,) = psutil.Process(boots[-1].pid).children()
            hosts[name] = Host(name=name, address=address, place=place, pid=first.pid)
        _connect(list(hosts.values()))
        yield hosts
    finally:
        for boot in boots:
            boot.kill()
            boot.wait()
        psutil.wait_procs([psutil.Process(h.pid) for h in hosts.values() if psutil.pid_exists(h.pid)], timeout=30)


def wait_for(what: str, true: object, log: Path | None = None) -> None:
    """Until `true()` is true."""
    assert callable(true)
    deadline = time.monotonic() + PATIENCE
    while not true():
        told = log.read_text(errors="replace")[-4000:] if log is not None and log.exists() else ""
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}\n{told}"
        time.sleep(0.2)


def _in(folder: Path, words: Sequence[str]) -> list[str]:
    return ["bash", "-c", 'cd "$0" && exec "$@"', str(folder), *words]


def _furnished(place: Path, keys: Path, addresses: Mapping[str, str]) -> Path:
    """A host's folder: what a machine has on the day it is handed over."""
    (place / "home" / ".ssh").mkdir(parents=True, mode=0o700)
    for key in keys.iterdir():
        shutil.copy(key, place / "home" / ".ssh" / key.name)
    shutil.copy(keys / "id_ed25519.pub", place / "home" / ".ssh" / "authorized_keys")
    (place / "home" / ".ssh" / "sshd_config").write_text(SSHD)
    (place / "home" / ".bashrc").touch()
    (place / "tmp").mkdir()
    (place / "tmp").chmod(0o1777)
    users = Path("/etc/passwd").read_text().splitlines()
    moved = [f"root:x:0:0:root:{HOME}:/bin/bash" if line.startswith("root:") else line for line in users]
    (place / "passwd").write_text("\n".join(moved) + "\n")
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (place / "hosts").write_text("\n".join(lines) + "\n")
    return place


def _booted(name: str, place: Path, shared: Path) -> subprocess.Popen:
    kept = [str(path) for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix))]
    with (place / "sshd.log").open("wb") as out:
        boot = subprocess.Popen(
            [*UNSHARED, str(BOOT), name, str(place), str(shared), *kept],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={"PATH": os.environ["PATH"], "HOME": str(HOME)},
        )

    def is_up() -> bool:
        assert boot.poll() is None, (place / "sshd.log").read_text()
        return (place / "home" / "booted").exists()

    wait_for(f"host {name}", is_up, place / "sshd.log")
    return boot


def _connect(hosts: Sequence[Host]) -> None:
    """A bridge on the first host, and a cable from every other one to it."""
    hub = hosts[0]
    _ip(hub, "link add name lan type bridge")
    _ip(hub, f"address add {hub.address}/24 dev lan")
    for host in hosts:
        _ip(host, "link set lo up")
    _ip(hub, "link set lan up")
    for number, host in enumerate(hosts[1:]):
        _ip(hub, f"link add port{number} type veth peer name eth0 netns {host.pid}")
        _ip(hub, f"link set port{number} master lan up")
        _ip(host, f"address add {host.address}/24 dev eth0")
        _ip(host, "link set eth0 up")
        _ip(host, f"route add default via {hub.address}")


def _ip(host: Host, words: str) -> None:
    # Of the machine's processes: those of a host are counted anew in it.
    subprocess.run(["nsenter", "--target", str(host.pid), "--net", "ip", *words.split()], check=True)
