"""Copies a finished teacher cache to a URL."""

import json
from collections.abc import Callable
from pathlib import Path

from data_sharding.cache.opening import INDEX, MANIFEST
from data_sharding.remote import Remote


def publish(folder: Path, target: Remote, progress: Callable[[int, int], None] | None = None) -> None:
    """Copy what a reader needs, the manifest last: before it is there, there is no cache. Shards that arrived earlier
    are not sent again: the hash of the content is in their names.

    `progress` is told (bytes there, bytes in all) after each file.
    """
    manifest = json.loads((folder / MANIFEST).read_bytes())
    there = target.sizes()
    names = [*(shard["name"] for shard in manifest["shards"]), INDEX, "key.json", MANIFEST]
    sizes = [(folder / name).stat().st_size for name in names]
    done = 0
    for name, size in zip(names, sizes, strict=True):
        if not (name.endswith(".arrow") and name != INDEX and there.get(name) == size):
            target.put(folder / name, name)
        done += size
        if progress is not None:
            progress(done, sum(sizes))
