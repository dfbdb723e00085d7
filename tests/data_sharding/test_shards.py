"""Promises of shards: what was packed comes back whole, or an error says which file, row and image is damaged."""

import json
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_sharding.record import Record
from data_sharding.record_codec import SCHEMA
from data_sharding.shards import PackedDataset, ShardCorrupt
from tests.data_sharding.packing import CATEGORIES, packed, record


def _assert_equal(found: Record, expected: Record) -> None:
    for field in fields(Record):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype, field.name
            assert a.shape == b.shape, field.name
            assert np.array_equal(a, b), field.name
        else:
            assert type(a) is type(b), field.name
            assert a == b, field.name


def test_a_folder_without_a_pack_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no complete pack.*pack the data set first"):
        PackedDataset.open(tmp_path)


@pytest.mark.parametrize("count", [1, 40])
def test_every_field_of_every_record_comes_back(tmp_path: Path, count: int) -> None:
    dataset = packed(tmp_path, count)
    assert len(dataset) == count
    assert sorted(dataset.image_ids.tolist()) == [1000 + i for i in range(count)]
    for position in range(count):
        expected = record(int(dataset.image_ids[position]) - 1000)
        _assert_equal(dataset.record(position), expected)
        assert (dataset.widths[position], dataset.heights[position]) == (expected.width, expected.height)
        assert dataset.objects[position] == len(expected.boxes)


def test_the_schema_carries_every_field_and_its_version() -> None:
    assert {f.name for f in fields(Record)} <= set(SCHEMA.names)
    assert SCHEMA.metadata[b"version"] == b"1"


def test_groups_are_the_shards(tmp_path: Path) -> None:
    dataset = packed(tmp_path)
    assert (dataset.split, dataset.categories) == ("train", CATEGORIES)
    assert dataset.groups.dtype == np.int32
    assert dataset.image_ids.dtype == np.int64
    assert len(dataset.shards) > 2
    assert np.bincount(dataset.groups).tolist() == dataset.shard_sizes.tolist()
    assert (np.diff(dataset.groups) >= 0).all()


def test_shards_are_arrow_files_that_anyone_can_read(tmp_path: Path) -> None:
    dataset = packed(tmp_path)
    file = pa.ipc.open_file(dataset.folder / dataset.shards[0].name)
    assert file.num_record_batches == dataset.shards[0].rows
    assert file.get_batch(0)["image"][0].as_py() == dataset.record(0).image


def test_records_belong_to_the_reader(tmp_path: Path) -> None:
    dataset = packed(tmp_path)
    position = int(np.flatnonzero(dataset.objects)[0])
    first = dataset.record(position)
    first.boxes[:] = -1
    assert (dataset.record(position).boxes >= 0).all()


def test_another_process_opens_the_same_data(tmp_path: Path) -> None:
    dataset = packed(tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.uid == dataset.uid
    _assert_equal(copy.record(7), dataset.record(7))


def test_every_flipped_byte_of_a_record_is_found_and_named(tmp_path: Path) -> None:
    dataset = packed(tmp_path, count=4)
    path = tmp_path / dataset.shards[0].name
    content = path.read_bytes()
    start, size = int(dataset._offsets[2]), int(dataset._bytes[2])
    for place in range(start, start + size, max(1, size // 40)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        reader = PackedDataset.open(tmp_path)
        told = rf"{path.name}: row 2 \(image id {reader.image_ids[2]}\)"
        with pytest.raises(ShardCorrupt, match=told):
            reader.record(2)
        reader.record(1)
        with pytest.raises(ShardCorrupt, match=path.name):
            reader.verify()


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_cut_shard_is_an_error_that_names_it_never_a_crash(tmp_path: Path, keep: int) -> None:
    dataset = packed(tmp_path)
    path = tmp_path / dataset.shards[-1].name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardCorrupt, match=rf"{path.name} has \d+ bytes"):
        PackedDataset.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    name = packed(tmp_path).shards[1].name
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        PackedDataset.open(tmp_path)


def test_a_damaged_index_or_manifest_is_named(tmp_path: Path) -> None:
    packed(tmp_path)
    manifest, index = tmp_path / "manifest.json", tmp_path / "index.arrow"
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    original = index.read_bytes()
    index.write_bytes(content)
    with pytest.raises(ShardCorrupt, match=r"index\.arrow"):
        PackedDataset.open(tmp_path)
    index.write_bytes(original)
    changed = json.loads(manifest.read_bytes()) | {"split": "val"}
    manifest.write_text(json.dumps(changed))
    with pytest.raises(ShardCorrupt, match=r"manifest\.json was changed"):
        PackedDataset.open(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ShardCorrupt, match=r"manifest\.json is not a manifest"):
        PackedDataset.open(tmp_path)


def test_a_pack_of_another_version_is_refused(tmp_path: Path) -> None:
    packed(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        PackedDataset.open(tmp_path)
