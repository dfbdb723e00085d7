"""Reads everything that a packed split or a teacher cache is made of, and tells of every byte that has changed.

A reader stops at the first damage that it meets; this goes on and lists all of it, by file, row and sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from data_sharding.files import unstamped
from data_sharding.remote import Remote, is_url, read_file

Kind = Literal["packed split", "teacher cache"]
Progress = Callable[[int, int], None]
MANIFEST, INDEX, RECEIPTS = "manifest.json", "index.arrow", "receipts"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something that is not what was written."""

    file: str
    """Below the folder or URL."""
    what: str
    row: int | None = None
    sample: str | None = None
    """Which image, and in which view."""


@dataclass(frozen=True)
class Place:
    """A folder or URL whose files are read whole."""

    location: str | Path

    def read(self, name: str) -> bytes | Damage:
        """A file's bytes, or what keeps them from being read."""
        try:
            return read_file(self.location, name)
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            return Damage(file=name, what="missing" if missing else f"cannot be read: {error}")

    def checked(self, name: str, size: int, digest: str) -> tuple[bytes, Damage | None]:
        """A file's bytes and what is wrong with them as a whole."""
        content = self.read(name)
        if isinstance(content, Damage):
            return b"", content
        if len(content) != size:
            return content, Damage(file=name, what=f"{len(content)} bytes, written were {size}")
        found = xxhash.xxh3_128_hexdigest(content)
        return content, None if found == digest else Damage(file=name, what=f"xxh3_128 {found}, written was {digest}")

    def receipts(self, shards: dict[str, dict[str, Any]]) -> Iterator[Damage]:
        """Receipts are what a killed writer goes on from: those that are there must say what the manifest says of
        their shards, by name. A copy of a finished set may lack them."""
        for name in self._names(RECEIPTS):
            content = self.read(name)
            if isinstance(content, Damage):
                yield content
                continue
            try:
                receipt = unstamped(content)
            except ValueError as error:
                yield Damage(file=name, what=str(error))
                continue
            said = receipt.get("shard", receipt)
            known = shards.get(said.get("name"))
            if known is None or any(said.get(field) != known[field] for field in ("bytes", "xxh3_128")):
                yield Damage(file=name, what=f"tells of {said.get('name')}, which the manifest does not name so")

    def _names(self, folder: str) -> list[str]:
        if is_url(self.location):
            return sorted(n for n in Remote(str(self.location)).sizes() if n.startswith(f"{folder}/"))
        return sorted(f"{folder}/{p.name}" for p in (Path(self.location) / folder).glob("*.json"))
