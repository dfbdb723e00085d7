"""Run as a program: one of several processes that stage the same twelve files, each in an order of its own.

Each holds two files at a time and compares their bytes; after each fetch it logs the name and what the folder takes.
"""

import random
import sys
from pathlib import Path

import xxhash

from data_sharding.files import locked
from data_sharding.remote import Remote
from data_sharding.staging import Held, Staging, Wanted, _present


def main(far: str, local: str, limit: int, log: Path, number: int) -> None:
    staging, held = Staging(Path(local), limit), list[Held]()
    real = Remote.fetch

    def fetch(self: Remote, name: str, target: Path) -> None:
        real(self, name, target)
        with locked(staging.folder / "locks" / "room"):
            total = sum(size for _, size, _ in _present(staging.folder))
        with log.open("a") as file:
            file.write(f"{name} {total}\n")

    Remote.fetch = fetch
    order = random.Random(number).sample(range(12), 12)
    for i in order:
        content = bytes([i]) * 1000
        wanted = Wanted(
            source=Remote(f"file://{far}"), name=f"s{i}", bytes=1000, xxh3_128=xxhash.xxh3_128_hexdigest(content)
        )
        if len(held) == 1:
            held.pop().release()
        held.append(staging.hold(wanted))
        assert held[-1].path.read_bytes() == content


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
