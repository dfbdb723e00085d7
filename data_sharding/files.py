"""Files that are whole or absent, whatever is killed when."""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

STAMP = "own_xxh3_128"
"""Where a JSON file of ours says the hash of the rest of it."""


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` so that `path` holds all of it or does not change, even after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing; waits for whoever holds it. The system gives it back
    when its holder dies, whatever it dies of."""
    descriptor = lock_file(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_file(path: Path) -> int:
    """A descriptor for `fcntl.flock`: two of the same file exclude each other, in one process too."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def hash_of(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()


def stamped(content: Mapping[str, Any]) -> bytes:
    """JSON that carries the hash of itself, one spelling per value."""
    return _plain(dict(content) | {STAMP: xxhash.xxh3_128_hexdigest(_plain(content))})


def unstamped(stored: bytes) -> dict[str, Any]:
    """What `stamped` was given. ValueError where a byte of it has changed."""
    content = json.loads(stored)
    if not isinstance(content, dict) or STAMP not in content:
        raise ValueError(f"holds no hash of itself ({STAMP}): damaged, or older; writing the set again puts it right")
    said = content.pop(STAMP)
    if stored != stamped(content):
        raise ValueError(f"its {STAMP} is said to be {said}, found {xxhash.xxh3_128_hexdigest(_plain(content))}")
    return content


def _plain(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
