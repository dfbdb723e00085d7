"""The mapped shard files of a teacher cache: opened when first needed, kept open, closed when too many are."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from data_sharding.cache.key import CacheKey
from data_sharding.cache.rows import ShardCorrupt, StoredRow, read_row
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


class MappedShard:
    """One mapped file. A row is read when it is first asked for, and then kept: its short parts in memory, its long
    ones as stretches of the mapping. That is what makes reading as fast as memory."""

    def __init__(self, file: ShardFile, key: CacheKey) -> None:
        """Raises ShardCorrupt for a file that is no shard."""
        file.require_size()
        self.file, self.key = file, key
        self._path = str(file.path)
        try:
            with pa.memory_map(self._path) as source:
                self._reader = pa.ipc.open_file(source.read_buffer())
        except (pa.ArrowException, ValueError, OSError) as error:
            raise ShardCorrupt(file.path, file.id, None, None, "a readable Arrow file", error) from error
        if self._reader.num_record_batches != file.rows:
            got = f"{self._reader.num_record_batches} batches"
            raise ShardCorrupt(file.path, file.id, None, None, f"{file.rows} rows", got)
        self._rows: list[StoredRow | None] = [None] * file.rows
        self.brought = bytearray(file.rows)
        """Rows whose pages somebody was asked to bring in."""
        self._lock = threading.Lock()

    def row(self, number: int, sample: tuple[int, int]) -> StoredRow:
        """One row, which must hold `sample` (image id, view). Raises ShardCorrupt for one that cannot be read."""
        found = self._rows[number]
        if found is None:
            found = self._rows[number] = self._read(number, sample)
        if found.image_id != sample[0] or found.view != sample[1]:
            got = (found.image_id, found.view)
            raise ShardCorrupt(self.file.path, self.file.id, number, sample, f"the sample {sample}", got)
        return found

    def require_size(self) -> None:
        """Raise ShardCorrupt where the file was cut since: reading on would end the process. A writer never does this,
        people do."""
        if os.stat(self._path).st_size != self.file.bytes:
            self.file.require_size()

    def _read(self, number: int, sample: tuple[int, int]) -> StoredRow:
        try:
            with self._lock:
                batch = self._reader.get_batch(number)
            batch.validate(full=True)
            if batch.num_rows != 1:
                raise ValueError(f"expected one row, found {batch.num_rows}")
            return read_row(batch, self.key)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, OSError) as error:
            raise ShardCorrupt(self.file.path, self.file.id, number, sample, "a readable row", error) from error


class MappedShards:
    """The `limit` most recently used shards stay mapped; a row handed out stays valid when its file is let go."""

    def __init__(self, shelf: Shelf, key: CacheKey, *, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"expected at least one open shard, got {limit}")
        self.shelf, self.key, self.limit = shelf, key, limit
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, number: int) -> MappedShard:
        """One shard, mapped. Raises ShardCorrupt for a file that is no shard or not as long as it was."""
        with self._lock:
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
        found = found or self._opened(number)
        found.require_size()
        return found

    def mapped(self, number: int) -> MappedShard | None:
        """One shard where it is mapped already."""
        return self._open.get(number)

    def __len__(self) -> int:
        """How many files are mapped now."""
        return len(self._open)

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

    def _opened(self, shard: int) -> MappedShard:
        """Fetching one file keeps nobody from reading others; of two threads that open the same, one wins."""
        opened = MappedShard(self._taken(shard), self.key)
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
