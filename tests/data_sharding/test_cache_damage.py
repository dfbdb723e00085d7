import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_sharding.cache.key import CacheKey
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.rows import CachedSample, ShardCorrupt
from data_sharding.codecs.catalogue import codec
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from tests.data_sharding.tiny import read, write


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("v*/*.arrow"))


def rows_of(path: Path) -> list[tuple[tuple[int, int], int, int]]:
    """Per row of a shard: its key, and the stretch of its payload in the file."""
    whole = pa.py_buffer(path.read_bytes())
    reader, rows = pa.ipc.open_file(whole), []
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i)
        start = batch.column("feat").buffers()[2].address - whole.address
        end = start + len(batch.column("feat")[0].as_py())
        rows.append(((batch["image_id"][0].as_py(), batch["view"][0].as_py()), start, end))
    return rows


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("verify", ["first", "always"])
def test_every_flipped_byte_is_reported_with_shard_row_and_key(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset, verify: Any
) -> None:
    random = np.random.Generator(np.random.Philox(7))
    position_of = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
    files = shard_files(cache_folder)
    for _ in range(50):
        path = files[random.integers(len(files))]
        rows = rows_of(path)
        row = int(random.integers(len(rows)))
        sample, start, end = rows[row]
        at = int(random.integers(start, end))
        flip(path, at)
        cache = TeacherCache.open(cache_folder, key, verify=verify)
        with pytest.raises(ShardCorrupt) as caught:
            cache.read([position_of[sample[0]]], [sample[1]])
        shard = path.relative_to(cache_folder).as_posix().rsplit("-", 1)[0]
        assert (caught.value.path, caught.value.shard, caught.value.row) == (path, shard, row)
        assert caught.value.key == sample
        assert caught.value.expected != caught.value.got
        flip(path, at)
        for (image_id, view), _, _ in rows:
            cache.read([position_of[image_id]], [view])


def test_a_flipped_byte_anywhere_in_a_shard_never_gives_other_features(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset
) -> None:
    path = min(shard_files(cache_folder), key=lambda p: p.stat().st_size)
    position_of = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
    asked = [(position_of[image_id], view) for (image_id, view), _, _ in rows_of(path)]
    good = [read(TeacherCache.open(cache_folder, key), [i], [k]) for i, k in asked]
    payload = [range(a, b) for _, a, b in rows_of(path)]
    header = [at for at in range(path.stat().st_size) if not any(at in stretch for stretch in payload)]
    noticed = 0
    for at in header[::37]:
        flip(path, at)
        try:
            cache = TeacherCache.open(cache_folder, key)
            found = [read(cache, [i], [k]) for i, k in asked]
            assert all(torch.equal(a, b) for x, y in zip(good, found, strict=True) for a, b in zip(x, y, strict=True))
        except ShardCorrupt:
            noticed += 1
        flip(path, at)
    assert noticed > 0


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_a_cut_file_is_an_error_that_names_it(cache_folder: Path, key: CacheKey, keep: float) -> None:
    path = shard_files(cache_folder)[-1]
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(ShardCorrupt, match=f"{path.name}.*expected .* bytes, got .* bytes"):
        TeacherCache.open(cache_folder, key)
    path.unlink()
    with pytest.raises(ShardCorrupt, match=path.name):
        TeacherCache.open(cache_folder, key)


def test_a_file_that_is_cut_while_it_is_mapped_does_not_end_the_process(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset
) -> None:
    cache = TeacherCache.open(cache_folder, key)
    cache.read([0], [0])
    for path in shard_files(cache_folder):
        os.truncate(path, 100)
    with pytest.raises(ShardCorrupt, match="got 100 bytes"):
        cache.read([0], [0])


def test_swapped_samples_are_noticed_by_their_key_even_without_checksums(
    tmp_path: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    key = replace(key, shard_bytes=2**20)
    write(tmp_path, key, dataset, views)
    path = max(shard_files(tmp_path), key=lambda p: len(rows_of(p)))
    reader = pa.ipc.open_file(path.read_bytes())
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    sink = pa.BufferOutputStream()
    same = next(
        (i, j)
        for i in range(len(batches))
        for j in range(i)
        if batches[i]["canvas"].to_pylist()[0][:2] == batches[j]["canvas"].to_pylist()[0][:2]
    )
    batches[same[0]], batches[same[1]] = batches[same[1]], batches[same[0]]
    with pa.ipc.new_file(sink, reader.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    path.write_bytes(sink.getvalue())
    cache = TeacherCache.open(tmp_path, key, verify="never")
    image_id, view = batches[same[0]]["image_id"][0].as_py(), batches[same[0]]["view"][0].as_py()
    position = int(np.flatnonzero(dataset.image_ids == image_id)[0])
    with pytest.raises(ShardCorrupt, match="expected the sample") as caught:
        cache.read([position], [view])
    assert caught.value.row == same[1]
    assert caught.value.key == (image_id, view)


@pytest.mark.parametrize("name", ["manifest.json", "index.arrow"])
def test_a_damaged_index_or_manifest_is_an_error(cache_folder: Path, key: CacheKey, name: str) -> None:
    path = cache_folder / name
    for at in range(0, path.stat().st_size, path.stat().st_size // 20):
        flip(path, at)
        with pytest.raises(ShardCorrupt, match=name):
            TeacherCache.open(cache_folder, key)
        flip(path, at)
    TeacherCache.open(cache_folder, key)


def test_whole_files_can_be_verified(cache_folder: Path, key: CacheKey) -> None:
    cache = TeacherCache.open(cache_folder, key)
    cache.verify_files()
    path = shard_files(cache_folder)[1]
    flip(path, path.stat().st_size // 2)
    with pytest.raises(ShardCorrupt, match=f"{path.name}.*expected xxh3_128"):
        cache.verify_files()


def test_the_first_read_is_verified_always_every_read_and_never_none(cache_folder: Path, key: CacheKey) -> None:
    with pytest.raises(ValueError, match="verify must be first, always or never, got 'often'"):
        TeacherCache.open(cache_folder, key, verify="often")  # type: ignore[arg-type]  # refused
    path = shard_files(cache_folder)[0]
    caches = {v: TeacherCache.open(cache_folder, key, verify=v) for v in ("first", "always", "never")}
    line = caches["first"].index.columns
    position = int(line["position"][0])
    for cache in caches.values():
        cache.read([position], [0])
    with path.open("r+b") as file:
        file.seek(rows_of(path)[0][1])
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    caches["first"].read([position], [0])
    caches["never"].read([position], [0])
    with pytest.raises(ShardCorrupt):
        caches["always"].read([position], [0])


def test_the_checksum_covers_everything_in_a_row() -> None:
    tap = codec("fp16").encode(torch.ones(2, 3, 4), level="p3")
    sample = CachedSample(image_id=1, view=0, canvas=(128, 128, 100, 90), taps=(tap,))
    changed = [
        replace(sample, image_id=2),
        replace(sample, view=1),
        replace(sample, canvas=(128, 128, 100, 91)),
        replace(sample, pixels=b"x"),
        replace(sample, taps=(replace(tap, rows=6),)),
        replace(sample, taps=(replace(tap, scale=b"x"),)),
        replace(sample, taps=(replace(tap, mask=b"x"),)),
    ]
    assert len({s.checksum for s in [sample, *changed]}) == 8
