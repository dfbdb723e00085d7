"""A packed split on disk, and its reader.

    manifest.json             uid, version, split, categories, and each shard with its bytes and hash
    index.arrow               one row per image: where it lies and the checksum of its bytes
    shard-00000-<hash>.arrow  Arrow IPC file, uncompressed, one record batch per record

Files are mapped once and never changed in place. Every record is compared with its checksum when a process first
reads it, for Arrow itself returns wrong data without a word after a flipped byte.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding.record import RECORD_VERSION, Category, Record
from data_sharding.record_codec import SCHEMA, decode
from data_sharding.remote import place_of, read_file

FORMAT = "minnow shards"
MANIFEST = "manifest.json"
INDEX = "index.arrow"
INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("objects", pa.int32()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("checksum", pa.uint64()),
    ]
)
"""`offset` and `bytes` bound the record's Arrow message in its shard file; `checksum` is their xxh3_64."""


class ShardCorrupt(Exception):
    """Stored bytes are not the ones that were written."""


@dataclass(frozen=True)
class Shard:
    """One file of whole records."""

    name: str
    rows: int
    bytes: int
    xxh3_128: str


class PackedDataset:
    """A packed split, opened for random access by position. Positions run through the shards in order."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], index: pa.Table) -> None:
        """Use `open`; this takes what `open` has checked."""
        self.folder = folder
        self.uid: str = manifest["uid"]
        """SHA-256 over the manifest, and through its hashes over every byte of index and shards."""
        self.split: str = manifest["split"]
        self.categories = tuple(Category(**c) for c in manifest["categories"])
        self.shards = tuple(Shard(**s) for s in manifest["shards"])
        columns = {name: index[name].to_numpy() for name in index.column_names}
        self.image_ids: np.ndarray = columns["image_id"]
        self.widths: np.ndarray = columns["width"]
        self.heights: np.ndarray = columns["height"]
        self.objects: np.ndarray = columns["objects"]
        self.groups: np.ndarray = columns["shard"]
        """(N,) int32: the shard of each image. A group is the images of one shard."""
        self.shard_sizes: np.ndarray = np.array([shard.rows for shard in self.shards], np.int64)
        self._rows, self._offsets, self._bytes = columns["row"], columns["offset"], columns["bytes"]
        self._checksums = columns["checksum"]
        self._seen = np.zeros(len(self.image_ids), np.bool_)
        self._mapped = [_map(folder / shard.name, shard.bytes) for shard in self.shards]

    @classmethod
    def open(cls, folder: str | Path) -> "PackedDataset":
        """Open a complete pack.

        Raises FileNotFoundError for a folder that holds none or lacks a file, ShardCorrupt for a file of the wrong
        size or a changed manifest or index; each names the file.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        index = _existing(folder / INDEX)
        return cls(folder, manifest, read_index(index.read_bytes(), manifest["index"], index))

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        """Another process opens the same folder by itself: mappings do not travel."""
        return PackedDataset.open, (self.folder,)

    def __len__(self) -> int:
        return len(self.image_ids)

    def record(self, position: int) -> Record:
        """The record at `position`; ShardCorrupt where its bytes are not the ones that were packed."""
        shard = self.groups[position]
        mapped = self._mapped[shard]
        # A file that was cut since would end the process; nothing of ours does this, people do.
        _require_size(self.folder / self.shards[shard].name, self.shards[shard].bytes)
        message = mapped.slice(int(self._offsets[position]), int(self._bytes[position]))
        if not self._seen[position]:
            self._check(position, message)
            self._seen[position] = True
        return decode(pa.ipc.read_record_batch(message, SCHEMA))

    def _check(self, position: int, message: pa.Buffer) -> None:
        found, expected = xxhash.xxh3_64_intdigest(message), int(self._checksums[position])
        if found != expected:
            shard = self.shards[self.groups[position]].name
            raise ShardCorrupt(
                f"{self.folder / shard}: row {self._rows[position]} (image id {self.image_ids[position]}) has checksum "
                f"{found:016x}, packed was {expected:016x}; delete this file and pack again: only it is made anew"
            )

    def verify(self) -> None:
        """Compare every byte of every shard with the manifest; ShardCorrupt names the first file that differs."""
        for shard, mapped in zip(self.shards, self._mapped, strict=True):
            found = xxhash.xxh3_128_hexdigest(mapped)
            if found != shard.xxh3_128:
                raise ShardCorrupt(f"{self.folder / shard.name} has hash {found}, packed was {shard.xxh3_128}")


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a complete pack, in a folder or behind a URL, compared with its own uid."""
    path = place_of(folder, MANIFEST)
    try:
        content = read_file(folder, MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no complete pack ({MANIFEST} is missing); pack the data set first"
        ) from None
    try:
        manifest = json.loads(content)
        uid, version = manifest["uid"], (manifest["format"], manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardCorrupt(f"{path} is not a manifest ({error!r}); delete it and pack again") from error
    if version != (FORMAT, RECORD_VERSION):
        raise ValueError(f"{path} is {version[0]} version {version[1]}, this code reads {FORMAT} {RECORD_VERSION}")
    if uid != manifest_uid(manifest):
        raise ShardCorrupt(f"{path} was changed after it was written (its uid differs); delete it and pack again")
    return manifest


def manifest_uid(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over everything else in the manifest."""
    content = {name: value for name, value in manifest.items() if name != "uid"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_index(content: bytes, expected: Mapping[str, Any], path: Path | str) -> pa.Table:
    """The index out of its file's bytes; ShardCorrupt, naming `path`, where they are not what the manifest says."""
    if len(content) != expected["bytes"] or xxhash.xxh3_128_hexdigest(content) != expected["xxh3_128"]:
        raise ShardCorrupt(f"{path} is not the index that was packed ({len(content)} bytes); delete it and pack again")
    return pa.ipc.open_file(content).read_all().combine_chunks()


def _map(path: Path, size: int) -> pa.Buffer:
    """The file's bytes, mapped; its size is compared first, for a shorter file than thought kills the process."""
    _require_size(path, size)
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _require_size(path: Path, size: int) -> None:
    found = _existing(path).stat().st_size
    if found != size:
        raise ShardCorrupt(f"{path} has {found} bytes, packed were {size}; delete it and pack again")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, but the manifest names it; pack again: only it is made anew")
    return path
