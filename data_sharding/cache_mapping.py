"""The mapped shard files of a teacher cache: opened when first needed, kept open, closed when too many are."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from data_sharding.cache_rows import ShardCorrupt


@dataclass(frozen=True)
class ShardFile:
    """A finished shard and what its manifest says of it."""

    path: Path
    id: str
    rows: int
    bytes: int
    xxh3_128: str

    def require_size(self) -> None:
        """Raise ShardCorrupt unless the file is as long as it was: reading a mapping past its end kills the process."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise ShardCorrupt(self.path, self.id, None, None, f"{self.bytes} bytes", error) from error
        if size != self.bytes:
            raise ShardCorrupt(self.path, self.id, None, None, f"{self.bytes} bytes", f"{size} bytes")

    def require_content(self) -> None:
        """Raise ShardCorrupt unless the whole file has the hash that it had when it was written."""
        self.require_size()
        hasher = xxhash.xxh3_128()
        with self.path.open("rb") as file:
            while chunk := file.read(2**22):
                hasher.update(chunk)
        if hasher.hexdigest() != self.xxh3_128:
            raise ShardCorrupt(self.path, self.id, None, None, f"xxh3_128 {self.xxh3_128}", hasher.hexdigest())


class MappedShards:
    """The `limit` most recently used shards stay mapped; a row handed out stays valid when its file is let go."""

    def __init__(self, files: Sequence[ShardFile], *, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"expected at least one open shard, got {limit}")
        self.files, self.limit = files, limit
        self._open: OrderedDict[int, list[pa.RecordBatch]] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, shard: int, row: int) -> pa.RecordBatch:
        """One row of one shard, not copied."""
        with self._lock:
            rows = self._open.get(shard)
            if rows is None:
                rows = self._open[shard] = _map(self.files[shard])
            self._open.move_to_end(shard)
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        # A file that was cut since would end the process; a writer never does this, people do.
        self.files[shard].require_size()
        return rows[row]

    def close(self) -> None:
        """Let go of all files; rows handed out stay valid."""
        with self._lock:
            self._open.clear()


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
