"""A packed split, every byte of it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding.pack_resuming import PLAN, read_plan
from data_sharding.problems import REPORT, checked_report
from data_sharding.record_codec import SCHEMA, decode
from data_sharding.remote import is_url
from data_sharding.shards import ShardCorrupt, read_index, read_manifest
from data_sharding.verify import INDEX, MANIFEST, Damage, Place, Progress

PLANNED = {"format", "version", "split", "images", "fingerprint", "categories", "shard_bytes", "on_bad"}


def packed_manifest(place: Place) -> dict[str, Any] | Damage:
    """The manifest, compared with its own uid."""
    try:
        manifest = read_manifest(place.location)
    except ShardCorrupt as error:
        return Damage(file=MANIFEST, what=str(error))
    if place.read(MANIFEST) != json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode():
        return Damage(file=MANIFEST, what="is not spelt as it was written")
    return manifest


def packed_index(place: Place, manifest: Mapping[str, Any]) -> dict[str, np.ndarray] | Damage:
    """The columns of the index."""
    content, damage = place.checked(INDEX, manifest["index"]["bytes"], manifest["index"]["xxh3_128"])
    if damage is not None:
        return damage
    table = read_index(content, manifest["index"], INDEX)
    return {name: table[name].to_numpy() for name in table.column_names}


def damages(place: Place, progress: Progress) -> Iterator[Damage]:
    """Everything that is wrong with a pack; `progress` is told (bytes read, bytes in all) of its shards."""
    manifest = packed_manifest(place)
    if isinstance(manifest, Damage):
        yield manifest
        return
    index = packed_index(place, manifest)
    if isinstance(index, Damage):
        yield index
        index = None
    done, total = 0, sum(shard["bytes"] for shard in manifest["shards"])
    for number, shard in enumerate(manifest["shards"]):
        yield from _of_shard(place, shard, index, number)
        done += shard["bytes"]
        progress(done, total)
    yield from place.receipts({shard["name"]: shard for shard in manifest["shards"]})
    report = place.read(REPORT)
    if isinstance(report, Damage):
        yield report
    else:
        try:
            checked_report(report)
        except ValueError as error:
            yield Damage(file=REPORT, what=str(error))
    if not is_url(place.location) and (Path(place.location) / PLAN).exists():
        yield from _of_plan(Path(place.location) / PLAN, manifest)


def _of_shard(
    place: Place, shard: Mapping[str, Any], index: Mapping[str, np.ndarray] | None, number: int
) -> Iterator[Damage]:
    name = shard["name"]
    content, damage = place.checked(name, shard["bytes"], shard["xxh3_128"])
    rows = [] if index is None or not content else list(_of_rows(name, content, index, number))
    if damage is not None and not rows:
        untouched = bool(content) and index is not None
        yield Damage(file=name, what=f"{damage.what}; no record is touched" if untouched else damage.what)
    yield from rows


def _of_rows(name: str, content: bytes, index: Mapping[str, np.ndarray], shard: int) -> Iterator[Damage]:
    whole = pa.py_buffer(content)
    for i in np.flatnonzero(index["shard"] == shard):
        start, size, image_id = int(index["offset"][i]), int(index["bytes"][i]), int(index["image_id"][i])
        message, written = (
            whole.slice(min(start, whole.size), max(0, min(size, whole.size - start))),
            int(index["checksum"][i]),
        )
        found = xxhash.xxh3_64_intdigest(message)
        what = f"xxh3_64 {found:016x}, written was {written:016x}" if found != written else None
        if what is None and (held := decode(pa.ipc.read_record_batch(message, SCHEMA)).image_id) != image_id:
            what = f"holds image {held}"
        if what is not None:
            yield Damage(file=name, row=int(index["row"][i]), sample=f"image {image_id}", what=what)


def _of_plan(path: Path, manifest: Mapping[str, Any]) -> Iterator[Damage]:
    """What a further `pack` compares its settings with."""
    try:
        plan = read_plan(path)
    except ValueError as error:
        yield Damage(file=path.name, what=str(error))
        return
    wrong = [name for name in ("format", "version", "split", "categories") if plan.get(name) != manifest[name]]
    wrong += sorted(plan.keys() - PLANNED)
    if wrong:
        yield Damage(file=path.name, what=f"{', '.join(wrong)}: not what the manifest says")
