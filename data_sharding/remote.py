"""Files that lie elsewhere: a folder or any URL that fsspec understands, read whole, and again when a transfer fails.

    /shared/caches            a folder, read in place
    s3://bucket/caches        an object store (gs://, abfs://, http://, ... likewise, with fsspec's package for it)
    file:///slow/caches       a folder that is too slow to train from, such as NFS: copied before use, as a URL is

Keys, endpoints and timeouts are the environment's (AWS_*, FSSPEC_S3_*) or fsspec's own configuration file, so that
no recipe, log or tracking server ever holds a secret.
"""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, ... try of a transfer; fsspec's packages try again by themselves as well."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


class RemoteError(OSError):
    """A transfer failed again and again."""


def is_url(location: str | Path) -> bool:
    """Whether a location is reached through fsspec; everything else is a folder."""
    return "://" in str(location)


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL. Every method raises FileNotFoundError, PermissionError, or RemoteError after the last
    try; each names the URL. It travels to other processes, its connections do not."""

    url: str
    pauses: tuple[float, ...] = PAUSES

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if not is_url(self.url) or not parts.scheme:
            raise ValueError(f"expected a URL such as s3://bucket/folder, got {self.url!r}")
        if "@" in parts.netloc:
            shown = f"{parts.scheme}://...@{parts.netloc.rpartition('@')[2]}{parts.path}"
            raise ValueError(
                f"{shown} holds a secret, which would end up in logs; give it to fsspec by the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, FSSPEC_S3_KEY, ...)"
            )

    def at(self, name: str) -> str:
        """The URL of a file below this folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return self._tried(name, lambda system, path: system.cat_file(path))

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to `target`, as long as the source says it is."""

        def receive(system: Any, path: str) -> None:
            system.get_file(path, str(target))
            said, found = int(system.size(path)), target.stat().st_size
            if found != said:
                raise OSError(f"{found} of {said} bytes arrived")

        self._tried(name, receive)

    def put(self, source: Path, name: str) -> None:
        """Copy a local file to `name`."""

        def send(system: Any, path: str) -> None:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(source), path)

        self._tried(name, send)

    def sizes(self) -> dict[str, int]:
        """The bytes of every file below this folder, by name; empty where there is none."""

        def listed(system: Any, path: str) -> dict[str, int]:
            system.invalidate_cache()  # what was listed before another process wrote is not what is there
            root = path.rstrip("/")
            found = system.find(root, detail=True).items()
            return {key.removeprefix(root).lstrip("/"): int(entry["size"]) for key, entry in found}

        return self._tried("", listed)

    def _tried(self, name: str, act: Callable[[Any, str], T]) -> T:
        from fsspec.core import url_to_fs

        url, last = self.at(name), None
        for number in range(len(self.pauses) + 1):
            if number:
                time.sleep(self.pauses[number - 1])
            try:
                return act(*url_to_fs(url))
            except ImportError as error:
                raise ValueError(f"{url} needs a package that is not installed: {error}") from error
            except _FINAL as error:
                raise type(error)(error.errno, str(error.strerror or error), url) from error
            except Exception as error:  # each of fsspec's packages has exceptions of its own
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                last = error
        raise RemoteError(f"{url}: failed {len(self.pauses) + 1} times, the last time with {last!r}") from last


def read_file(location: str | Path, name: str) -> bytes:
    """All bytes of a file below a folder or a URL."""
    return Remote(str(location)).read(name) if is_url(location) else (Path(location) / name).read_bytes()


def place_of(location: str | Path, name: str) -> Path | str:
    """Where a file below a folder or a URL is, for opening it and for telling a person."""
    return Remote(str(location)).at(name) if is_url(location) else Path(location) / name
