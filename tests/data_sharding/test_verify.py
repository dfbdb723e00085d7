"""Flip a byte or cut a file, anywhere: what is read is reported before it is used, the rest when all is looked at."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data_sharding import verify_cache, verify_packed
from data_sharding.cache.key import CacheKey
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.rows import ShardCorrupt as CacheShardCorrupt
from data_sharding.cache.writer import CacheWriter
from data_sharding.shards import PackedDataset, ShardCorrupt
from data_sharding.verify import Damage, Place, damages
from data_sharding.views import ViewTable
from tests.data_sharding.packing import files, packed
from tests.data_sharding.test_cache_damage import rows_of, shard_files
from tests.data_sharding.tiny import KEYS, content, tiny_dataset, tiny_key, tiny_taps, tiny_views, write

FLIPS = 1000


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedDataset, ViewTable]:
    dataset = tiny_dataset(tmp_path_factory.mktemp("few"), count=4)
    return dataset, tiny_views(dataset)


@pytest.fixture(params=KEYS)
def small(
    request: pytest.FixtureRequest, tmp_path: Path, few: tuple[PackedDataset, ViewTable]
) -> tuple[Path, CacheKey]:
    """A finished cache of eight samples."""
    key = tiny_key(*few, **KEYS[request.param])
    return write(tmp_path / "cache", key, *few).folder, key


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """One bit is another one in place, as a failing disk does it; mappings of the file see it."""
    with path.open("r+b", buffering=0) as file:
        for value in (None, 0):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << bit]))
            if value is None:
                yield


def of_cache(folder: Path) -> list[Damage]:
    return list(damages(verify_cache, Place(folder), lambda done, total: None))


def of_pack(folder: Path) -> list[Damage]:
    return list(damages(verify_packed, Place(folder), lambda done, total: None))


def test_a_thousand_flipped_payload_bytes_are_told_with_shard_row_and_key_before_the_sample_is_used(
    small: tuple[Path, CacheKey], few: tuple[PackedDataset, ViewTable]
) -> None:
    folder, key = small
    position_of = {int(image_id): i for i, image_id in enumerate(few[0].image_ids)}
    rows = [(path, row, *facts) for path in shard_files(folder) for row, facts in enumerate(rows_of(path))]
    rows = [r for r in rows if r[4] > r[3]]  # a sparse sample without objects has no payload
    random = np.random.Generator(np.random.Philox(1))
    cache = TeacherCache.open(folder, key)
    for number in range(FLIPS):
        path, row, sample, start, end = rows[random.integers(len(rows))]
        with flipped(path, int(random.integers(start, end)), number % 8):
            with pytest.raises(CacheShardCorrupt) as told:
                cache.read([position_of[sample[0]]], [sample[1]])
            assert (told.value.path, told.value.row, told.value.key) == (path, row, sample)
            assert path.name.startswith(told.value.shard.partition("/")[2])
    for _, _, (image_id, view), _, _ in rows:
        cache.read([position_of[image_id]], [view])


def test_a_thousand_flipped_bytes_of_records_are_told_with_file_row_and_image(tmp_path: Path) -> None:
    folder = packed(tmp_path, count=12, shard_bytes=12_000).folder
    random = np.random.Generator(np.random.Philox(2))
    dataset = PackedDataset.open(folder)
    for number in range(FLIPS):
        i = int(random.integers(len(dataset)))
        path = folder / dataset.shards[dataset.groups[i]].name
        at = int(dataset._offsets[i] + random.integers(dataset._bytes[i]))
        with flipped(path, at, number % 8):
            told = rf"{path.name}: row {dataset._rows[i]} \(image id {dataset.image_ids[i]}\) has checksum"
            with pytest.raises(ShardCorrupt, match=told):
                dataset.record(i)
    assert len([dataset.record(i) for i in range(len(dataset))]) == 12


def require_all_told(folder: Path, look: Callable[[Path], list[Damage]], flips: int) -> None:
    """Each flip and each cut of a file is told with that file, and nothing else is."""
    assert look(folder) == []
    random = np.random.Generator(np.random.Philox(3))
    names = list(content(folder))
    for number in range(flips):
        path = folder / names[number % len(names)]
        with flipped(path, int(random.integers(path.stat().st_size)), int(random.integers(8))):
            assert {d.file for d in look(folder)} == {path.relative_to(folder).as_posix()}
    for name in names:
        whole = (folder / name).read_bytes()
        for keep in (0, 1, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:keep])
            assert name in {d.file for d in look(folder)}, (name, keep)
        (folder / name).write_bytes(whole)
    assert look(folder) == []


def test_every_flipped_byte_and_every_cut_of_a_cache_is_listed_with_its_file(small: tuple[Path, CacheKey]) -> None:
    require_all_told(small[0], of_cache, flips=300)


def test_every_flipped_byte_and_every_cut_of_a_pack_is_listed_with_its_file(tmp_path: Path) -> None:
    folder = packed(tmp_path / "packed", count=6, shard_bytes=6_000).folder
    require_all_told(folder, of_pack, flips=300)


def test_damaged_samples_are_listed_each_with_row_and_key(small: tuple[Path, CacheKey]) -> None:
    folder, _ = small
    path = max(shard_files(folder), key=lambda p: sum(end > start for _, start, end in rows_of(p)))
    rows = [(row, *facts) for row, facts in enumerate(rows_of(path)) if facts[2] > facts[1]]
    whole = bytearray(path.read_bytes())
    for _, _, start, _ in rows:
        whole[start] ^= 1
    path.write_bytes(whole)
    expected = [(row, f"image {image}, view {view}") for row, (image, view), _, _ in rows]
    assert [(d.row, d.sample) for d in of_cache(folder)] == expected
    missing = shard_files(folder)[0]
    missing.unlink()
    assert Damage(file=missing.relative_to(folder).as_posix(), what="missing") in of_cache(folder)


def test_a_copy_without_receipts_is_whole(small: tuple[Path, CacheKey]) -> None:
    shutil.rmtree(small[0] / "receipts")
    assert of_cache(small[0]) == []


def test_a_receipt_with_a_flipped_byte_is_not_believed(
    small: tuple[Path, CacheKey], few: tuple[PackedDataset, ViewTable]
) -> None:
    folder, key = small
    before = content(folder)
    random = np.random.Generator(np.random.Philox(4))
    for receipt in sorted((folder / "receipts").glob("*.json")):
        whole = bytearray(receipt.read_bytes())
        whole[int(random.integers(len(whole)))] ^= 4
        receipt.write_bytes(whole)
    writer = CacheWriter(folder, key, *few)
    assert [s.id for s in writer.pending()] == [s.id for s in writer.shards]
    for shard in writer.pending():
        writer.fill(shard, tiny_taps(key, few[1]))
    writer.finish()
    assert content(folder) == before


def test_a_pack_with_flipped_bytes_in_its_receipts_is_packed_again_to_the_same_bytes(tmp_path: Path) -> None:
    packed(tmp_path, count=6, shard_bytes=6_000)
    before = files(tmp_path)
    for receipt in (tmp_path / "receipts").glob("*.json"):
        told = json.loads(receipt.read_bytes())
        told["rows"][0][1] += 1  # a width that no checksum of the record would notice
        receipt.write_text(json.dumps(told, sort_keys=True, separators=(",", ":")))
    packed(tmp_path, count=6, shard_bytes=6_000)
    assert files(tmp_path) == before
