"""A teacher cache, every byte of it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding.cache.key import CACHE_FORMAT, CacheKey, canonical_json
from data_sharding.cache.rows import read_row
from data_sharding.verify import INDEX, MANIFEST, Damage, Place, Progress


def stored_key(manifest: Mapping[str, Any]) -> CacheKey:
    """The key out of a manifest. ValueError where it is of another version of the format."""
    stored = manifest["key"]
    if stored.get("format") != CACHE_FORMAT:
        raise ValueError(
            f"the cache has format {stored.get('format')}, this code reads {CACHE_FORMAT}; fill it again, or read it "
            "with the code that wrote it"
        )
    names = {field.name for field in fields(CacheKey)}
    return CacheKey(**{name: _frozen(value) for name, value in stored.items() if name in names})


def cache_manifest(place: Place) -> dict[str, Any] | Damage:
    """The manifest, compared with its own hash."""
    content = place.read(MANIFEST)
    if isinstance(content, Damage):
        return content
    try:
        manifest = json.loads(content)
        said = manifest.pop("xxh3_128")
    except (ValueError, KeyError, AttributeError) as error:
        return Damage(file=MANIFEST, what=f"cannot be read: {error!r}")
    found = xxhash.xxh3_128_hexdigest(canonical_json(manifest))
    if found != said or content != canonical_json(manifest | {"xxh3_128": said}):
        return Damage(file=MANIFEST, what=f"its xxh3_128 is said to be {said}, found {found}")
    return manifest


def cache_index(place: Place, manifest: Mapping[str, Any]) -> dict[str, np.ndarray] | Damage:
    """The columns of the index."""
    content, damage = place.checked(INDEX, manifest["index"]["bytes"], manifest["index"]["xxh3_128"])
    if damage is not None:
        return damage
    table = pa.ipc.open_file(content).read_all()
    return {name: table[name].to_numpy() for name in table.column_names}


def damages(place: Place, progress: Progress) -> Iterator[Damage]:
    """Everything that is wrong with a cache; `progress` is told (bytes read, bytes in all) of its shards."""
    manifest = cache_manifest(place)
    if isinstance(manifest, Damage):
        yield manifest
        return
    key = stored_key(manifest)
    stored = place.read("key.json")
    if isinstance(stored, Damage):
        yield stored
    elif stored != canonical_json(asdict(key)):
        yield Damage(file="key.json", what="is not the key that the manifest holds")
    index = cache_index(place, manifest)
    if isinstance(index, Damage):
        yield index
        index = None
    done, total = 0, sum(shard["bytes"] for shard in manifest["shards"])
    for number, shard in enumerate(manifest["shards"]):
        yield from _of_shard(place, shard, _lines(index, number), key)
        done += shard["bytes"]
        progress(done, total)
    yield from place.receipts({shard["name"]: shard for shard in manifest["shards"]})


Line = tuple[int, int, int]
"""Image id, view and checksum of a row."""


def _lines(index: Mapping[str, np.ndarray] | None, shard: int) -> list[Line] | None:
    if index is None:
        return None
    mine = np.flatnonzero(index["shard"] == shard)
    mine = mine[np.argsort(index["row"][mine])]
    return [(int(index["image_id"][i]), int(index["view"][i]), int(index["checksum"][i])) for i in mine]


def _of_shard(place: Place, shard: Mapping[str, Any], lines: list[Line] | None, key: CacheKey) -> Iterator[Damage]:
    name = shard["name"]
    content, damage = place.checked(name, shard["bytes"], shard["xxh3_128"])
    if not content:
        yield damage or Damage(file=name, what="empty")
        return
    of_rows = list(_of_rows(name, content, lines, key)) if lines is not None else []
    if damage is not None and not any(d.row is not None for d in of_rows):
        yield Damage(file=name, what=f"{damage.what}; no sample is touched" if not of_rows and lines else damage.what)
    yield from of_rows


def _of_rows(name: str, content: bytes, lines: list[Line], key: CacheKey) -> Iterator[Damage]:
    try:
        reader = pa.ipc.open_file(content)
        count = reader.num_record_batches
    except (pa.ArrowException, ValueError, OSError) as error:
        yield Damage(file=name, what=f"not a readable Arrow file: {error}")
        return
    if count != len(lines):
        yield Damage(file=name, what=f"{count} rows, written were {len(lines)}")
    for row, (image_id, view, checksum) in enumerate(lines[:count]):
        sample = f"image {image_id}, view {view}"
        try:
            batch = reader.get_batch(row)
            batch.validate(full=True)
            found = read_row(batch, key)
            digest = found.digest()
            same = (found.image_id, found.view) == (image_id, view) and digest == checksum == found.checksum
            what = f"xxh3_64 {digest:016x}, written was {checksum:016x}"
        except (pa.ArrowException, ValueError, TypeError, OverflowError, OSError) as error:
            same, what = False, f"not a readable row: {error}"
        if not same:
            yield Damage(file=name, row=row, sample=sample, what=what)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
