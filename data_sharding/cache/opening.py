"""What is read of a teacher cache before its first sample: manifest, index, and how long its files are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding.cache.key import COMMAND, CacheKey, canonical_json
from data_sharding.cache.mapping import Folder, ShardFile, Shelf
from data_sharding.cache.rows import ShardCorrupt
from data_sharding.cache.writer import CacheIncomplete
from data_sharding.remote import Remote, is_url, read_file
from data_sharding.staged_shards import StagedShards
from data_sharding.staging import SourceCorrupt, Staging

MANIFEST, INDEX = "manifest.json", "index.arrow"


def open_shelf(folder: Path | str, names: Sequence[str], files: Sequence[ShardFile], staging: Staging | None) -> Shelf:
    """Where the shards are taken from, after a look at the length of each: SourceCorrupt, ShardCorrupt."""
    if staging is None or not is_url(folder):
        for file in files:
            file.require_size()
        return Folder(files)
    source = Remote(str(folder))
    sizes = source.sizes()
    for name, file in zip(names, files, strict=True):
        if sizes.get(name) != file.bytes:
            found = f"{sizes[name]} bytes" if name in sizes else "no such file"
            raise SourceCorrupt(source.at(name), f"{file.bytes} bytes", found)
    return StagedShards(source, staging, files, names)


def read_manifest(folder: Path | str, key: CacheKey) -> dict[str, Any]:
    """The manifest of a finished cache that was made with exactly `key`. Raises CacheIncomplete where there is none,
    ShardCorrupt where it has changed, and ForeignCache."""
    path = f"{folder}/{MANIFEST}"
    try:
        content = read_file(folder, MANIFEST)
    except FileNotFoundError:
        written = 0 if is_url(folder) else len(list((Path(folder) / "receipts").glob("*.json")))
        raise CacheIncomplete(
            f"{folder} holds no finished teacher cache ({written} shards are written); run `{COMMAND}` to fill it"
        ) from None
    try:
        manifest = json.loads(content)
        stated = manifest.pop("xxh3_128")
        found = xxhash.xxh3_128(canonical_json(manifest)).hexdigest()
    except (ValueError, KeyError, AttributeError) as error:
        raise ShardCorrupt(path, "manifest", None, None, "a readable manifest", error) from error
    if stated != found:
        raise ShardCorrupt(path, "manifest", None, None, f"xxh3_128 {stated}", found)
    key.require_same(folder, manifest["key"])
    return manifest


def read_index(folder: Path | str, stated: dict[str, Any]) -> dict[str, np.ndarray]:
    """The columns of the index, one value per sample; ShardCorrupt where they are not what the manifest says."""
    path = f"{folder}/{INDEX}"
    try:
        content = read_file(folder, INDEX)
    except OSError as error:
        raise ShardCorrupt(path, "index", None, None, "a readable index", error) from error
    found = xxhash.xxh3_128(content).hexdigest()
    if found != stated["xxh3_128"]:
        raise ShardCorrupt(path, "index", None, None, f"xxh3_128 {stated['xxh3_128']}", found)
    table = pa.ipc.open_file(content).read_all()
    return {name: table[name].to_numpy() for name in table.column_names}
