"""The shards of a teacher cache that lies elsewhere, as files of this machine: fetched when needed, or before."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from data_sharding.cache.mapping import ShardFile
from data_sharding.remote import Remote
from data_sharding.staging import Held, Staging, Wanted

THREADS = 2
"""Shards that are fetched ahead at the same time; what a step waits for is fetched beside them."""


class StagedShards:
    """A shelf (`cache.mapping.Shelf`) that gets its files from a URL. Safe to use from several threads."""

    def __init__(self, source: Remote, staging: Staging, files: Sequence[ShardFile], names: Sequence[str]) -> None:
        """`files[n]` says what shard n must be, `names[n]` where it lies below the source."""
        self.files, self.staging = files, staging
        self._wanted = [
            Wanted(source=source, name=name, bytes=file.bytes, xxh3_128=file.xxh3_128)
            for file, name in zip(files, names, strict=True)
        ]
        self._held: dict[int, Held] = {}
        self._checked: set[int] = set()
        self._renewed: set[int] = set()
        self._coming: set[int] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="staging")

    def take(self, shard: int) -> ShardFile:
        """The copy of a shard on this machine; it makes room for no other until `put_back`."""
        with self._lock:
            held = self._held.get(shard)
        if held is None:
            held = self._hold(shard)
            with self._lock:
                if shard in self._held:  # another thread was first
                    held.release()
                held = self._held.setdefault(shard, held)
        return replace(self.files[shard], path=held.path)

    def put_back(self, shard: int) -> None:
        """The copy may make room for others."""
        with self._lock:
            held = self._held.pop(shard, None)
        if held is not None:
            held.release()

    def renew(self, shard: int) -> bool:
        """Compare the copy with its hash again, and fetch it again where it differs; once per shard and process."""
        with self._lock:
            if shard in self._renewed:
                return False
            self._renewed.add(shard)
            self._checked.discard(shard)
        self.put_back(shard)
        self.take(shard)
        return True

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, the first one first. What fails is tried again, and told, when it is
        needed."""
        with self._lock:
            new = [s for s in shards if s not in self._held and s not in self._coming]
            self._coming.update(new)
        for shard in new:
            self._pool.submit(self._stage, shard)

    def close(self) -> None:
        """Give all copies back and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for shard in list(self._held):
            self.put_back(shard)

    def _stage(self, shard: int) -> None:
        try:
            self._hold(shard).release()
        finally:
            with self._lock:
                self._coming.discard(shard)

    def _hold(self, shard: int) -> Held:
        held = self.staging.hold(self._wanted[shard], checked=shard in self._checked)
        self._checked.add(shard)
        return held
