"""Run as a program: fills a teacher cache with writers that are killed at given moments, one after the other, as one
of another number of writers each time.

Each writer is a fork of this process, which has imported everything and started no thread. It dies by SIGKILL at its
n-th write, sync or rename; the last one finishes the cache.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_sharding.cache.writer import CacheWriter, _HashingFile
from data_sharding.shards import PackedDataset
from tests.data_sharding.tiny import KEYS, tiny_key, tiny_taps, tiny_views


def die_after(calls: int) -> None:
    """Let the process be killed in the middle of its file operation number `calls`."""
    left = calls

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]  # to die in it
    _HashingFile.write = counted(_HashingFile.write)  # type: ignore[method-assign]  # to die in it


def fill(packed: Path, folder: Path, stored: str, part: int, parts: int) -> None:
    dataset = PackedDataset.open(packed)
    views = tiny_views(dataset)
    key = tiny_key(dataset, views, **KEYS[stored])
    writer = CacheWriter(folder, key, dataset, views)
    for shard in writer.pending(part, parts):
        writer.fill(shard, tiny_taps(key, views))


def main(packed: Path, folder: Path, stored: str, moments: list[int]) -> None:
    for number, calls in enumerate(moments):
        child = os.fork()
        if child == 0:
            die_after(calls)
            fill(packed, folder, stored, number % (1 + number % 5), 1 + number % 5)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write("killed\n" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], [int(n) for n in sys.argv[4:]])
