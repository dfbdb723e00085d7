"""The mapped shard files of a teacher cache: opened when first needed, kept open, closed when too many are."""

import threading
from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from data_sharding.cache_rows import ShardCorrupt
from data_sharding.files import hash_of
from data_sharding.staging import StagingFull


@dataclass(frozen=True)
class ShardFile:
    """A finished shard and what its manifest says of it."""

    path: Path | str
    """A file of this machine, or the URL of one elsewhere, which is not read but copied."""
    id: str
    rows: int
    bytes: int
    xxh3_128: str

    def require_size(self) -> None:
        """Raise ShardCorrupt unless the file is as long as it was: reading a mapping past its end kills the process."""
        try:
            size = Path(self.path).stat().st_size
        except OSError as error:
            raise ShardCorrupt(self.path, self.id, None, None, f"{self.bytes} bytes", error) from error
        if size != self.bytes:
            raise ShardCorrupt(self.path, self.id, None, None, f"{self.bytes} bytes", f"{size} bytes")

    def require_content(self) -> None:
        """Raise ShardCorrupt unless the whole file has the hash that it had when it was written."""
        self.require_size()
        found = hash_of(Path(self.path))
        if found != self.xxh3_128:
            raise ShardCorrupt(self.path, self.id, None, None, f"xxh3_128 {self.xxh3_128}", found)


class Shelf(Protocol):
    """Where the shards of a cache are taken from, by their numbers."""

    def take(self, shard: int) -> ShardFile:
        """The file on a disk of this machine; it stays there until `put_back`."""
        ...

    def put_back(self, shard: int) -> None:
        """The file is not needed for now."""
        ...

    def renew(self, shard: int) -> bool:
        """Get a damaged file anew; False where there is nowhere to get it from, or it was tried before."""
        ...


@dataclass(frozen=True)
class Folder:
    """The shelf of a cache that is read where it lies."""

    files: Sequence[ShardFile]

    def take(self, shard: int) -> ShardFile:
        """The file itself."""
        return self.files[shard]

    def put_back(self, shard: int) -> None:
        """Nothing to do."""

    def renew(self, shard: int) -> bool:
        """There is no other copy."""
        return False


class MappedShards:
    """The `limit` most recently used shards stay mapped; a row handed out stays valid when its file is let go."""

    def __init__(self, shelf: Shelf, *, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"expected at least one open shard, got {limit}")
        self.shelf, self.limit = shelf, limit
        self._open: OrderedDict[int, tuple[ShardFile, list[pa.RecordBatch]]] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, shard: int, row: int) -> pa.RecordBatch:
        """One row of one shard, not copied."""
        with self._lock:
            found = self._open.get(shard)
            if found is not None:
                self._open.move_to_end(shard)
        file, rows = found or self._opened(shard)
        # A file that was cut since would end the process; a writer never does this, people do.
        file.require_size()
        return rows[row]

    def let_go(self, shard: int) -> None:
        """Close one file; rows handed out stay valid."""
        with self._lock:
            if self._open.pop(shard, None) is not None:
                self.shelf.put_back(shard)

    def keep(self, shards: Set[int]) -> None:
        """Close all other files; rows handed out stay valid."""
        with self._lock:
            others = [shard for shard in self._open if shard not in shards]
        for shard in others:
            self.let_go(shard)

    def renew(self, shard: int) -> bool:
        """Get a damaged file anew, where there is a source to get it from and it was not tried before."""
        with self._lock:
            self._open.pop(shard, None)
        return self.shelf.renew(shard)

    def close(self) -> None:
        """Let go of all files; rows handed out stay valid."""
        self.keep(set())

    def _opened(self, shard: int) -> tuple[ShardFile, list[pa.RecordBatch]]:
        """Fetching one file keeps nobody from reading others; of two threads that open the same, one wins."""
        file = self._taken(shard)
        opened = (file, _map(file))
        with self._lock:
            opened = self._open.setdefault(shard, opened)
            oldest = list(self._open)[: max(0, len(self._open) - self.limit)]
        for other in oldest:
            self.let_go(other)
        return opened

    def _taken(self, shard: int) -> ShardFile:
        while True:
            try:
                return self.shelf.take(shard)
            except StagingFull:
                with self._lock:
                    oldest = next(iter(self._open), None)
                if oldest is None:
                    raise
                self.let_go(oldest)


def _map(file: ShardFile) -> list[pa.RecordBatch]:
    """The rows of a shard in its mapping. Parsing once and keeping them is what makes reading as fast as memory."""
    file.require_size()
    try:
        with pa.memory_map(str(file.path)) as source:
            reader = pa.ipc.open_file(source.read_buffer())
        rows = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for row in rows:
            row.validate(full=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ShardCorrupt(file.path, file.id, None, None, "a readable Arrow file", error) from error
    if [r.num_rows for r in rows] != [1] * file.rows:
        raise ShardCorrupt(file.path, file.id, None, None, f"{file.rows} rows", f"{len(rows)} batches")
    return rows
