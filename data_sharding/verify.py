"""Reads everything that a packed split or a teacher cache is made of, and tells of every byte that has changed.

A reader stops at the first damage that it meets; this goes on and lists all of it, by file, row and sample.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
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


class Contents(Protocol):
    """What a packed split and a teacher cache do not share: the modules `verify_packed` and `verify_cache`."""

    def manifest_of(self, place: Place) -> dict[str, Any] | Damage:
        """The manifest, compared with its own hash."""
        ...

    def damaged_rows(
        self, name: str, content: bytes, index: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
    ) -> Iterator[Damage]:
        """What is wrong in one shard, row by row; `index` has its lines alone."""
        ...

    def beside(self, place: Place, manifest: Mapping[str, Any]) -> Iterator[Damage]:
        """What is wrong with the files beside manifest, index, shards and receipts."""
        ...


def index_of(place: Place, manifest: Mapping[str, Any]) -> dict[str, np.ndarray] | Damage:
    """The columns of the index."""
    content, damage = place.checked(INDEX, manifest["index"]["bytes"], manifest["index"]["xxh3_128"])
    if damage is not None:
        return damage
    table = pa.ipc.open_file(content).read_all()
    return {name: table[name].to_numpy() for name in table.column_names}


def damages(contents: Contents, place: Place, progress: Progress) -> Iterator[Damage]:
    """Everything that is wrong; `progress` is told (bytes read, bytes in all) of the shards."""
    manifest = contents.manifest_of(place)
    if isinstance(manifest, Damage):
        yield manifest
        return
    index = index_of(place, manifest)
    if isinstance(index, Damage):
        yield index
        index = None
    done, total = 0, sum(shard["bytes"] for shard in manifest["shards"])
    for number, shard in enumerate(manifest["shards"]):
        lines = None if index is None else {name: x[index["shard"] == number] for name, x in index.items()}
        yield from _of_shard(contents, place, shard, lines, manifest)
        done += shard["bytes"]
        progress(done, total)
    yield from place.receipts({shard["name"]: shard for shard in manifest["shards"]})
    yield from contents.beside(place, manifest)


def _of_shard(
    contents: Contents,
    place: Place,
    shard: Mapping[str, Any],
    lines: Mapping[str, np.ndarray] | None,
    manifest: Mapping[str, Any],
) -> Iterator[Damage]:
    name = shard["name"]
    content, damage = place.checked(name, shard["bytes"], shard["xxh3_128"])
    if not content:
        yield damage or Damage(file=name, what="empty")
        return
    found = [] if lines is None else list(contents.damaged_rows(name, content, lines, manifest))
    if damage is not None and not any(d.row is not None for d in found):
        untouched = lines is not None and not found
        yield Damage(file=name, what=f"{damage.what}; no sample is touched" if untouched else damage.what)
    yield from found
