"""`ray up ray_cluster.yaml` on hosts in namespaces: a laptop outside, a head, workers, and a tracking server."""

import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster_netns import hosts, record
from tests.cluster_netns.hosts import HOME, ROOT, Host, started_hosts, wait_for
from tests.cluster_netns.record import Record, started_record

WORKERS = ("alpha", "beta")
NAMES = ("laptop", "head", *WORKERS, "record")
ADDRESS = "http://127.0.0.1:8265"
PLAIN = ("--log-style=pretty", "--log-color=false")
FILE = f"{HOME}/ray_cluster.yaml"
TOKEN = {"RAY_AUTH_MODE": "token"}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\x07")


def why_not() -> str | None:
    """What this machine lacks for such a cluster; None: nothing."""
    return hosts.why_not() or record.why_not()


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that was brought up, and whom to ask on it."""

    hosts: Mapping[str, Host]
    record: Record
    token: str
    logs: Path
    """Of the commands that were typed on the laptop."""

    @property
    def laptop(self) -> Host:
        """Where a person sits: outside of the cluster, with the token, and the tunnel open."""
        return self.hosts["laptop"]

    @property
    def secrets(self) -> dict[str, str]:
        """What nobody but who needs it may know, by what it is."""
        return {
            "token": self.token,
            "tracking password": self.record.password,
            "database password": self.record.database_password,
        }

    def type(self, words: Sequence[str], log: str, environment: Mapping[str, str] | None = None) -> int:
        """Type a command on the laptop; its exit code."""
        return self.laptop.run(words, self.logs / log, environment)

    def said(self, log: str) -> str:
        """What a command told, without colours."""
        return CONTROL.sub("", (self.logs / log).read_text(errors="replace"))


@contextmanager
def started_cluster(folder: Path) -> Iterator[Cluster]:
    """All hosts up, `ray up` done, both workers there and the tunnel open, for the time inside."""
    with started_hosts(folder, NAMES) as made:
        tracking = started_record(made["record"])
        token = secrets.token_hex(32)
        logs = folder / "logs"
        logs.mkdir()
        cluster = Cluster(hosts=made, record=tracking, token=token, logs=logs)
        _furnish(cluster)
        # Ray gives a node 30 s for its start, which a busy machine exceeds: typed again it begins anew.
        wait_for("ray up", lambda: cluster.type(["ray", "up", "--yes", *PLAIN, FILE], "up") == 0, logs / "up")
        wait_for("both workers", lambda: _nodes(cluster) == len(WORKERS), logs / "status")
        cluster.laptop.start(["ssh", *_LOGIN, "-N", "-L", "8265:127.0.0.1:8265", "root@head"], logs / "tunnel")
        asked = ["ray", "job", "list", "--address", ADDRESS]
        wait_for("the tunnel", lambda: cluster.type(asked, "tunnel", TOKEN) == 0, logs / "tunnel")
        yield cluster


_LOGIN = ("-i", f"{HOME}/.ssh/id_ed25519", "-o", "StrictHostKeyChecking=no", "-o", "ExitOnForwardFailure=yes")


def filled_in(text: str) -> dict[str, Any]:
    """The cluster file with its marked lines filled in for these hosts."""
    found = yaml.safe_load(text)
    addresses = {name: f"{hosts.NETWORK}.{number}" for number, name in enumerate(NAMES, 1)}
    found["provider"] |= {"head_ip": addresses["head"], "worker_ips": [addresses[name] for name in WORKERS]}
    found["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    found["file_mounts"]["~/minnow/node.env"] = "~/.minnow/node.env"
    # All hosts see the machine's processors: say that a worker has one, so that two workers need two hosts.
    for key, share in (("head", "--num-cpus=0"), ("worker", "--num-cpus=1")):
        commands = found[f"{key}_start_ray_commands"]
        found[f"{key}_start_ray_commands"] = [c.replace("ray start", f"ray start {share}") for c in commands]
    return found


def _furnish(cluster: Cluster) -> None:
    """What a person has on the laptop before `ray up`, and on the nodes an environment from an earlier time."""
    home = cluster.laptop.place / "home"
    for path, text in (
        (home / ".ray" / "auth_token", cluster.token),
        (home / ".minnow" / "node.env", _node_environment(cluster.record)),
        (home / "ray_cluster.yaml", yaml.safe_dump(filled_in((ROOT / "ray_cluster.yaml").read_text()))),
    ):
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(text)
    for name in ("head", *WORKERS):
        minnow = cluster.hosts[name].place / "home" / "minnow"
        minnow.mkdir()
        (minnow / ".venv").symlink_to(sys.prefix)
        shutil.copy(ROOT / "requirements.lock", minnow / "installed.lock")


def _node_environment(tracking: Record) -> str:
    return f"MLFLOW_TRACKING_USERNAME={tracking.user}\nMLFLOW_TRACKING_PASSWORD={tracking.password}\n"


def _nodes(cluster: Cluster) -> int:
    """How many nodes with a processor the head knows, asked as a person would."""
    (cluster.logs / "status").write_text("")
    if cluster.type(["ray", "exec", FILE, "ray status"], "status") != 0:
        return 0
    found = re.search(r"0\.0/(\d+)\.0 CPU", cluster.said("status"))
    return int(found[1]) if found else 0


def listening(host: Host) -> list[tuple[str, int]]:
    """Address and port of everything that waits for connections on a host."""
    words = ["nsenter", "--target", str(host.pid), "--net", "ss", "-Hltn"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    places = [line.split()[3].rpartition(":") for line in lines]
    return [(address.strip("[]"), int(port)) for address, _, port in places]
