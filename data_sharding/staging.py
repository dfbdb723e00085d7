"""A folder on a node's own disk for copies of files that lie elsewhere, shared by all processes of the node.

A copy is fetched under a temporary name, compared with its hash and renamed into place; it is never changed there, so
whoever has mapped it reads on whatever happens. The least recently used copies make room for new ones, except those
that a process holds. Locks are the system's, one file per copy: the death of a process gives them back.
"""

import errno
import fcntl
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_sharding.files import hash_of, lock_file, locked
from data_sharding.remote import Remote
from data_sharding.shards import ShardCorrupt

LOG = logging.getLogger(__name__)
TRIES = 2
"""A file that arrives with other bytes than it should have is fetched once more; then its source is damaged."""


class SourceCorrupt(ShardCorrupt):
    """A file that lies elsewhere is not the one that was written. Nothing is replaced: the run stops and says where."""

    def __init__(self, url: str, expected: object, got: object) -> None:
        self.url, self.expected, self.got = url, expected, got
        super().__init__(
            f"{url}: expected {expected}, got {got}; upload this file again from where it was made, or delete it there "
            "and make it anew"
        )


class StagingFull(OSError):
    """What the processes of a node hold leaves no room for one more file."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file that lies elsewhere and what its bytes must be."""

    source: Remote
    name: str
    """Below the source; it holds the hash of the content, so that one name never means two files."""
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Held:
    """A copy that stays where it is until it is released."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Let it make room for others. Once only."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class Staging:
    """The folder of one node. All processes that share it should be given the same limit."""

    folder: Path
    limit: int
    """Bytes of all copies together, those on the way included."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"expected a staging limit of at least 1 byte, got {self.limit}")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._locks.mkdir(exist_ok=True, mode=0o700)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(13, "belongs to another user; choose another staging folder", str(self.folder))

    def __reduce__(self) -> tuple[object, tuple[Path, int]]:
        """On another node it is that node's folder."""
        return Staging, (self.folder, self.limit)

    def hold(self, wanted: Wanted, *, checked: bool = False) -> Held:
        """The copy of a file, fetched where it is missing or damaged.

        `checked`: this process has compared an existing copy with its hash already; its size is compared always.
        Raises SourceCorrupt, StagingFull, or what `Remote` raises.
        """
        path = self.folder / wanted.name.replace("/", "-")
        use = lock_file(self._locks / f"{path.name}.use")
        try:
            fcntl.flock(use, fcntl.LOCK_SH)
            if not _is_sound(path, wanted, checked):
                # Held as shared by this process and exclusively by none: whoever fetches waits for nobody who reads.
                with locked(self._locks / f"{path.name}.fetch"):
                    if not _is_sound(path, wanted, checked=False):
                        self._fetch(wanted, path)
            os.utime(path)
        except BaseException:
            os.close(use)
            raise
        return Held(path, use)

    @property
    def _locks(self) -> Path:
        return self.folder / "locks"

    def _fetch(self, wanted: Wanted, path: Path) -> None:
        if path.exists():
            LOG.warning("%s was damaged; fetching it again from %s", path, wanted.source.at(wanted.name))
            path.unlink()
        got = ""
        for _ in range(TRIES):
            with self._room(wanted, path) as temporary:
                self._receive(wanted, temporary)
                size = temporary.stat().st_size
                got = f"{size} bytes" if size != wanted.bytes else f"xxh3_128 {hash_of(temporary)}"
                if got == f"xxh3_128 {wanted.xxh3_128}":
                    with locked(self._locks / "room"):  # who counts bytes sees one name or the other
                        temporary.replace(path)
                    return
        expected = f"{wanted.bytes} bytes with xxh3_128 {wanted.xxh3_128}"
        raise SourceCorrupt(wanted.source.at(wanted.name), expected, f"{got}, {TRIES} times")

    def _receive(self, wanted: Wanted, temporary: Path) -> None:
        try:
            wanted.source.fetch(wanted.name, temporary)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise StagingFull(
                f"{self.folder}: the disk is full before the limit of {self.limit / 1e9:.3g} GB is reached; lower "
                "resources.staging_gb, or choose another folder with resources.staging"
            ) from error

    @contextmanager
    def _room(self, wanted: Wanted, path: Path) -> Iterator[Path]:
        """A temporary name whose bytes, said in the name, count before they arrive."""
        for stale in self.folder.glob(f"{path.name}.tmp.*"):  # whoever wrote it had the lock that is ours now
            stale.unlink(missing_ok=True)
        temporary = self.folder / f"{path.name}.tmp.{wanted.bytes}.{uuid.uuid4().hex}"
        with locked(self._locks / "room"):
            self._evict_for(wanted)
            temporary.touch(0o600)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _evict_for(self, wanted: Wanted) -> None:
        present = sorted(_present(self.folder))
        total = sum(size for _, size, _ in present)
        for _, size, path in present:
            if total + wanted.bytes <= self.limit:
                return
            total -= size if self._evicted(path) else 0
        if total + wanted.bytes > self.limit:
            raise StagingFull(
                f"{self.folder}: {wanted.name} needs {wanted.bytes / 1e9:.3g} GB, and {total / 1e9:.3g} GB of the "
                f"limit of {self.limit / 1e9:.3g} GB are in use by processes of this machine; raise "
                "resources.staging_gb, or lower order.window"
            )

    def _evicted(self, path: Path) -> bool:
        """Delete a copy that nobody holds, or what somebody who died left of one."""
        name, _, on_the_way = path.name.partition(".tmp.")
        lock = lock_file(self._locks / f"{name}.{'fetch' if on_the_way else 'use'}")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True


def default_folder() -> Path:
    """This user's folder among the machine's temporary files."""
    return Path(tempfile.gettempdir()) / f"minnow-staging-{os.getuid()}"


def _present(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, path) of every copy, and of those on the way with all their bytes."""
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            _, _, on_the_way = entry.name.partition(".tmp.")
            try:
                found = entry.stat()
            except FileNotFoundError:  # renamed or released since
                continue
            yield found.st_mtime, int(on_the_way.partition(".")[0]) if on_the_way else found.st_size, Path(entry.path)


def _is_sound(path: Path, wanted: Wanted, checked: bool) -> bool:
    try:
        return path.stat().st_size == wanted.bytes and (checked or hash_of(path) == wanted.xxh3_128)
    except FileNotFoundError:
        return False
