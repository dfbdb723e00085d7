"""What is peculiar to a teacher cache when every byte of it is read; `verify.damages` reads it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding.cache.key import CACHE_FORMAT, CacheKey, canonical_json
from data_sharding.cache.rows import read_row
from data_sharding.verify import MANIFEST, Damage, Place


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


def manifest_of(place: Place) -> dict[str, Any] | Damage:
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


def damaged_rows(
    name: str, content: bytes, index: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> Iterator[Damage]:
    """Samples that differ from their lines in the index, or cannot be read."""
    key, count = stored_key(manifest), len(index["row"])
    try:
        reader = pa.ipc.open_file(content)
        held = reader.num_record_batches
    except (pa.ArrowException, ValueError, OSError) as error:
        yield Damage(file=name, what=f"not a readable Arrow file: {error}")
        return
    if held != count:
        yield Damage(file=name, what=f"{held} rows, written were {count}")
    columns = (index[column].tolist() for column in ("row", "image_id", "view", "checksum"))
    for row, image_id, view, checksum in sorted(zip(*columns, strict=True))[:held]:
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
            yield Damage(file=name, row=row, sample=f"image {image_id}, view {view}", what=what)


def beside(place: Place, manifest: Mapping[str, Any]) -> Iterator[Damage]:
    """The key, which the manifest holds too."""
    stored = place.read("key.json")
    if isinstance(stored, Damage):
        yield stored
    elif stored != canonical_json(asdict(stored_key(manifest))):
        yield Damage(file="key.json", what="is not the key that the manifest holds")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
