"""What is peculiar to a packed split when every byte of it is read; `verify.damages` reads it."""

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
from data_sharding.shards import ShardCorrupt, read_manifest
from data_sharding.verify import MANIFEST, Damage, Place

PLANNED = {"format", "version", "split", "images", "fingerprint", "categories", "shard_bytes", "on_bad"}


def manifest_of(place: Place) -> dict[str, Any] | Damage:
    """The manifest, compared with its own uid."""
    try:
        manifest = read_manifest(place.location)
    except ShardCorrupt as error:
        return Damage(file=MANIFEST, what=str(error))
    if place.read(MANIFEST) != json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode():
        return Damage(file=MANIFEST, what="is not spelt as it was written")
    return manifest


def damaged_rows(
    name: str, content: bytes, index: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> Iterator[Damage]:
    """Records that differ from their lines in the index."""
    whole = pa.py_buffer(content)
    columns = (index[column].tolist() for column in ("row", "offset", "bytes", "image_id", "checksum"))
    for row, start, size, image_id, written in zip(*columns, strict=True):
        message = whole.slice(min(start, whole.size), max(0, min(size, whole.size - start)))
        found = xxhash.xxh3_64_intdigest(message)
        what = f"xxh3_64 {found:016x}, written was {written:016x}" if found != written else None
        if what is None and (held := decode(pa.ipc.read_record_batch(message, SCHEMA)).image_id) != image_id:
            what = f"holds image {held}"
        if what is not None:
            yield Damage(file=name, row=row, sample=f"image {image_id}", what=what)


def beside(place: Place, manifest: Mapping[str, Any]) -> Iterator[Damage]:
    """The report of what was found while packing, and the plan, which a further `pack` compares its settings with."""
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


def _of_plan(path: Path, manifest: Mapping[str, Any]) -> Iterator[Damage]:
    try:
        plan = read_plan(path)
    except ValueError as error:
        yield Damage(file=path.name, what=str(error))
        return
    wrong = [name for name in ("format", "version", "split", "categories") if plan.get(name) != manifest[name]]
    wrong += sorted(plan.keys() - PLANNED)
    if wrong:
        yield Damage(file=path.name, what=f"{', '.join(wrong)}: not what the manifest says")
