"""A network of its own for a cluster on this machine, whose cables can be cut: Linux network namespaces.

They have no names and end with the process that made them, however it ends."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.fault_disk import NotPermitted

NETWORK = "10.78.0"
HOLDER = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity")


class Wires:
    """A hub, in which the head and the command are, and places that hang on it by one cable each. Files and processes
    are the machine's."""

    def __init__(self) -> None:
        tried = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
        if tried.returncode:
            raise NotPermitted(f"network namespaces: {tried.stderr.strip()}")
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self.hub = f"{NETWORK}.1"
        self._hold("hub")
        for words in (
            "link set lo up",
            "link add lan type bridge",
            f"address add {self.hub}/24 dev lan",
            "link set lan up",
            "route add default dev lan",  # Ray asks by which address the world is reached
        ):
            self._ip("hub", words)

    def plug(self, name: str) -> str:
        """A new place; its address."""
        process, number = self._hold(name), len(self._holders)
        address = f"{NETWORK}.{number}"
        self._ip("hub", f"link add {name} type veth peer name eth0 netns {process.pid}")
        self._ip("hub", f"link set {name} master lan up")
        for words in (
            "link set lo up",
            f"address add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {self.hub}",
        ):
            self._ip(name, words)
        return address

    def cut(self, name: str) -> None:
        """Take a place's link down: what is there lives and reaches nobody."""
        self._ip("hub", f"link set {name} down")

    def inside(self, name: str) -> tuple[str, ...]:
        """Words before a command that is given at a place."""
        return ("nsenter", "--target", str(self._holders[name].pid), "--net")

    def close(self) -> None:
        """Nothing is left of it but what still runs there."""
        for process in self._holders.values():
            process.kill()
            process.wait()

    def _hold(self, name: str) -> subprocess.Popen[bytes]:
        """A namespace, held by a process that does nothing; returns once it is there."""
        process = self._holders[name] = subprocess.Popen(HOLDER)
        mine = _namespace("self")
        while _namespace(process.pid) == mine:
            assert process.poll() is None, "the namespace's process has ended"
        return process

    def _ip(self, name: str, words: str) -> None:
        subprocess.run([*self.inside(name), "ip", *words.split()], check=True)


@contextmanager
def wired() -> Iterator[Wires]:
    """A network for the time inside."""
    wires = Wires()
    try:
        yield wires
    finally:
        wires.close()


def _namespace(process: int | str) -> str:
    return os.readlink(f"/proc/{process}/ns/net")
