"""Data set -> shards.

Images are permuted once, here: an epoch can then read shard after shard and still meet random neighbours. A shard is
renamed into place when all of it is on disk, and a receipt follows it; the manifest comes last. A pack that is killed
at any moment and started again goes on behind the last receipt and ends with the same bytes.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding.datasets.base import DatasetPlugin, Source
from data_sharding.files import write_atomically
from data_sharding.keyed import uniforms
from data_sharding.record import RECORD_VERSION, Category, Record
from data_sharding.record_codec import SCHEMA, encode
from data_sharding.shards import FORMAT, INDEX, INDEX_SCHEMA, MANIFEST, PackedDataset, Shard, manifest_uid

PLAN = "pack.json"
RECEIPTS = "receipts"
SHARD_BYTES = 64 << 20


def pack(
    dataset_config: object,
    module: DatasetPlugin,
    split: str,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> PackedDataset:
    """Write a split of a data set into `folder`, or complete or check what is there, and open it.

    `module` is the data set's plug-in; `progress` is told (images packed, images in all) after each image. A shard
    holds whole records, at most `shard_bytes` of them unless one alone is larger.

    Raises ValueError where `folder` holds another data set, split or shard size, where the source changed since, or
    where two records share an id; BlockingIOError where another process is packing into the same folder.
    """
    folder, source, categories = Path(folder), module.source(dataset_config, split), module.categories(dataset_config)
    (folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _claim(folder, _plan(source, categories, split, shard_bytes))
        order = np.argsort(uniforms("pack", source.fingerprint, count=source.count), kind="stable")
        receipts = _pack_shards(folder, source, order, shard_bytes, len(categories), progress)
        _finish(folder, receipts, categories, split)
    return PackedDataset.open(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One packer at a time. The system gives the lock back when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BlockingIOError(f"another process is packing into {folder}; wait for it or choose a folder") from error
    finally:
        os.close(descriptor)


def _plan(source: Source, categories: Sequence[Category], split: str, shard_bytes: int) -> dict[str, Any]:
    if source.count < 1:
        raise ValueError(f"split {split!r} has no images to pack")
    return {
        "format": FORMAT,
        "version": RECORD_VERSION,
        "split": split,
        "images": source.count,
        "fingerprint": source.fingerprint,
        "categories": [asdict(c) for c in categories],
        "shard_bytes": shard_bytes,
    }


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or refuse a folder that was begun with another one; sweep up what a killed pack left."""
    path = folder / PLAN
    if path.exists():
        begun = json.loads(path.read_bytes())
        differing = sorted(k for k in begun | plan if begun.get(k) != plan.get(k))
        if differing:
            told = "; ".join(f"{k} was {str(begun.get(k))[:80]}, is {str(plan.get(k))[:80]}" for k in differing)
            raise ValueError(
                f"{folder} was packed from something else ({told}). Choose another folder, or delete this one to pack "
                "anew; whatever was computed from it (views, teacher caches) is then void"
            )
    else:
        if list(folder.glob("shard-*")) or (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds shards but no {PLAN}; choose an empty folder, or delete this one")
        write_atomically(path, _as_json(plan))
    for leftover in [*folder.glob("*.tmp.*"), *folder.glob(f"{RECEIPTS}/*.tmp.*")]:
        leftover.unlink()


def _pack_shards(
    folder: Path,
    source: Source,
    order: np.ndarray,
    shard_bytes: int,
    num_classes: int,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the receipts of all of them, in order."""
    receipts: list[dict[str, Any]] = []
    done = 0
    while done < source.count:
        path = folder / RECEIPTS / f"{len(receipts):05d}.json"
        known = json.loads(path.read_bytes()) if path.exists() else None
        if known is not None and _is_whole(folder / known["shard"]["name"], known["shard"]):
            receipt = known
        else:
            records = _records(source, order, done, num_classes, progress)
            content, receipt = _shard(records, shard_bytes, len(receipts))
            if known is not None and known != receipt:
                raise ValueError(
                    f"{folder / known['shard']['name']} is missing or damaged and cannot be made again: the image "
                    "files have changed since they were packed. Restore them, or delete the folder and pack anew"
                )
            write_atomically(folder / receipt["shard"]["name"], memoryview(content))
            write_atomically(path, _as_json(receipt))
        receipts.append(receipt)
        done += receipt["shard"]["rows"]
        if progress is not None:
            progress(done, source.count)
    return receipts


def _is_whole(path: Path, shard: dict[str, Any]) -> bool:
    if not path.exists() or path.stat().st_size != shard["bytes"]:
        return False
    with path.open("rb") as file:
        digest = xxhash.xxh3_128()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() == shard["xxh3_128"]


def _records(
    source: Source, order: np.ndarray, start: int, num_classes: int, progress: Callable[[int, int], None] | None
) -> Iterator[Record]:
    for done, position in enumerate(order[start:].tolist(), start):
        if progress is not None:
            progress(done, source.count)
        record = source.read(position)
        if len(record.labels) and not 0 <= record.labels.min() <= record.labels.max() < num_classes:
            raise ValueError(f"{record.file_name}: labels {record.labels.tolist()} outside [0, {num_classes})")
        yield record


def _shard(records: Iterator[Record], shard_bytes: int, number: int) -> tuple[pa.Buffer, dict[str, Any]]:
    """The bytes of one shard with as many of the next records as fit, and its receipt."""
    sink = pa.BufferOutputStream()
    rows: list[list[int]] = []
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for record in records:
            batch = encode(record)
            size = pa.ipc.get_record_batch_size(batch)
            if rows and sink.tell() + size > shard_bytes:
                break
            writer.write_batch(batch)
            message = batch.serialize()
            where = [number, len(rows), sink.tell() - size, size, xxhash.xxh3_64_intdigest(message)]
            rows.append([record.image_id, record.width, record.height, len(record.boxes), *where])
    content = sink.getvalue()
    digest = xxhash.xxh3_128_hexdigest(content)
    shard = Shard(f"shard-{number:05d}-{digest}.arrow", len(rows), content.size, digest)
    return content, {"shard": asdict(shard), "rows": rows}


def _finish(folder: Path, receipts: list[dict[str, Any]], categories: Sequence[Category], split: str) -> None:
    """Index, then manifest; and away with shards that it does not name."""
    columns = zip(*(row for receipt in receipts for row in receipt["rows"]), strict=True)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)], schema=INDEX_SCHEMA)
    _refuse_shared_ids(table["image_id"].to_numpy(), folder)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(table)
    index = sink.getvalue()
    manifest = {
        "format": FORMAT,
        "version": RECORD_VERSION,
        "split": split,
        "complete": True,
        "categories": [asdict(c) for c in categories],
        "index": {"bytes": index.size, "xxh3_128": xxhash.xxh3_128_hexdigest(index)},
        "shards": [receipt["shard"] for receipt in receipts],
    }
    manifest["uid"] = manifest_uid(manifest)
    for name, content in ((INDEX, index), (MANIFEST, _as_json(manifest))):
        write_atomically(folder / name, memoryview(content))
    named = {receipt["shard"]["name"] for receipt in receipts}
    for orphan in folder.glob("shard-*.arrow"):
        if orphan.name not in named:
            orphan.unlink()


def _refuse_shared_ids(image_ids: np.ndarray, folder: Path) -> None:
    found, counts = np.unique(image_ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{folder}: image ids {found[counts > 1][:10].tolist()} belong to more than one image")


def _as_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
