"""Data set -> shards.

Images are permuted once, here: an epoch can then read shard after shard and still meet random neighbours. A shard is
renamed into place when all of it is on disk, and a receipt follows it; the manifest comes last. A pack that is killed
at any moment and started again goes on behind the last receipt and ends with the same bytes.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_sharding.datasets.base import DatasetPlugin, Source
from data_sharding.files import stamped, write_atomically
from data_sharding.keyed import uniforms
from data_sharding.pack_reading import THREADS, RecordReader
from data_sharding.pack_resuming import PLAN, is_whole, read_plan, read_receipt
from data_sharding.problems import REPORT, BadImage, Problem, Problems, report
from data_sharding.record import RECORD_VERSION, Category
from data_sharding.record_codec import SCHEMA, encode
from data_sharding.shards import FORMAT, INDEX, INDEX_SCHEMA, MANIFEST, PackedDataset, Shard, manifest_uid

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
    holds whole records, at most `shard_bytes` of them unless one alone is larger. What was wrong and is left out, and
    what was irregular, stands in `problems.json` beside the shards.

    Where `on_bad` is stop, ValueError tells of all unusable labels and image headers before anything is packed, and of
    all images that cannot be decoded after reading them all. It is also raised where `folder` holds another data set,
    split or shard size, where the source changed since, or where two records share an id; BlockingIOError where
    another process is packing into the same folder.
    """
    folder, source, categories = Path(folder), module.source(dataset_config, split), module.categories(dataset_config)
    (folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _claim(folder, _plan(source, categories, split, shard_bytes))
        order = np.argsort(uniforms("pack", source.fingerprint, count=source.count), kind="stable")
        with ThreadPoolExecutor(THREADS, thread_name_prefix="pack") as pool:
            try:
                reader = RecordReader(source, order, len(categories), pool)
                receipts = _pack_shards(folder, source, reader, shard_bytes, progress)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        _finish(folder, receipts, categories, split, source.problems)
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
        "on_bad": source.problems.on_bad,
    }


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or refuse a finished pack of another one; sweep up what a killed pack left.

    A pack that never was finished is begun anew under another plan: nothing can have been computed from it, and
    whoever puts a bad image right and starts again means just that.
    """
    path = folder / PLAN
    if path.exists():
        begun = {"on_bad": "stop"} | read_plan(path)  # of packs from before there was a choice
        differing = sorted(k for k in begun | plan if begun.get(k) != plan.get(k))
        if differing and (folder / MANIFEST).exists():
            told = "; ".join(f"{k} was {str(begun.get(k))[:80]}, is {str(plan.get(k))[:80]}" for k in differing)
            raise ValueError(
                f"{folder} was packed from something else ({told}). Choose another folder, or delete this one to pack "
                "anew; whatever was computed from it (views, teacher caches) is then void"
            )
        if differing:
            for begun_file in [*folder.glob(f"{RECEIPTS}/*.json"), *folder.glob("shard-*.arrow")]:
                begun_file.unlink()
            write_atomically(path, stamped(plan))
    else:
        if list(folder.glob("shard-*")) or (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds shards but no {PLAN}; choose an empty folder, or delete this one")
        write_atomically(path, stamped(plan))
    for leftover in [*folder.glob("*.tmp.*"), *folder.glob(f"{RECEIPTS}/*.tmp.*")]:
        leftover.unlink()


def _pack_shards(
    folder: Path,
    source: Source,
    reader: RecordReader,
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the receipts of all of them, in order."""
    receipts: list[dict[str, Any]] = []
    done = 0
    while done < source.count:
        path = folder / RECEIPTS / f"{len(receipts):05d}.json"
        known = read_receipt(path)
        if known is not None and is_whole(folder / known["shard"]["name"], known["shard"]):
            receipt = known
        else:
            reader.seek(done)
            content, receipt = _shard(reader, shard_bytes, len(receipts), source, progress)
            if known is not None and known["shard"] != receipt["shard"]:
                raise ValueError(
                    f"{folder / known['shard']['name']} is missing or damaged and cannot be made again: the image "
                    "files have changed since they were packed. Restore them, or delete the folder and pack anew"
                )
            write_atomically(folder / receipt["shard"]["name"], memoryview(content))
            write_atomically(path, stamped(receipt))
        receipts.append(receipt)
        done += receipt.get("read", receipt["shard"]["rows"])
        if progress is not None:
            progress(done, source.count)
    return receipts


def _shard(
    reader: RecordReader,
    shard_bytes: int,
    number: int,
    source: Source,
    progress: Callable[[int, int], None] | None,
) -> tuple[pa.Buffer, dict[str, Any]]:
    """The bytes of one shard with as many of the next records as fit, and its receipt. What is skipped on the way to
    the record that no longer fits belongs to this shard. Once an image stops the packing, the rest is only looked at,
    and ValueError tells of all."""
    sink = pa.BufferOutputStream()
    rows: list[list[int]] = []
    skipped = Problems(source.problems.source, source.problems.on_bad)
    first = reader.at
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        while (record := reader.peek()) is not None:
            if progress is not None:
                progress(reader.at, source.count)
            if isinstance(record, BadImage):
                skipped.image(record.kind, record.file, record.detail)
            elif not skipped.stopping:
                batch = encode(record)
                size = pa.ipc.get_record_batch_size(batch)
                if rows and sink.tell() + size > shard_bytes:
                    break
                writer.write_batch(batch)
                message = batch.serialize()
                where = [number, len(rows), sink.tell() - size, size, xxhash.xxh3_64_intdigest(message)]
                rows.append([record.image_id, record.width, record.height, len(record.boxes), *where])
            reader.take()
    skipped.stop_if_any()
    if not rows:
        raise ValueError(f"{source.problems.source}: none of the {source.count} images can be decoded")
    content = sink.getvalue()
    digest = xxhash.xxh3_128_hexdigest(content)
    shard = Shard(f"shard-{number:05d}-{digest}.arrow", len(rows), content.size, digest)
    receipt: dict[str, Any] = {"shard": asdict(shard), "rows": rows}
    if skipped.found:
        receipt |= {"read": reader.at - first, "problems": [asdict(p) for p in skipped.found]}
    return content, receipt


def _finish(
    folder: Path, receipts: list[dict[str, Any]], categories: Sequence[Category], split: str, problems: Problems
) -> None:
    """Index and report, then manifest; and away with shards that it does not name."""
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
    found = problems.found + [Problem(**p) for receipt in receipts for p in receipt.get("problems", [])]
    files = ((INDEX, index), (REPORT, report(split, problems.on_bad, found)), (MANIFEST, _as_json(manifest)))
    for name, content in files:
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
