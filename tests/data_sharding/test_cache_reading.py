"""Who owns the memory of a batch, which files stay mapped, and that readers in several threads do not meet."""

import errno
import gc
import mmap
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_sharding.cache import reader
from data_sharding.cache.batch import CHUNK
from data_sharding.cache.buffers import BatchBuffers
from data_sharding.cache.key import CacheKey
from data_sharding.cache.pages import MADV_POPULATE_READ, Pages, madvise
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.rows import ShardCorrupt
from data_sharding.loader import Loader, order_of
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from data_sharding.world import World
from tests.data_sharding.tiny import one_canvas, read, tensors, tiny_key, write


def test_memory_that_nobody_holds_is_lent_again() -> None:
    buffers = BatchBuffers()
    address = buffers.take(1000).data_ptr()
    assert buffers.take(1000).data_ptr() == address
    assert buffers.take(10).data_ptr() == address
    assert len(buffers.take(0)) == 0
    assert len(buffers.take(3000)) == 3000


@pytest.mark.parametrize("kept", ["itself", "a part", "a view of other type", "its numpy array", "a part of that"])
def test_memory_is_not_lent_twice_while_anything_over_it_lives(kept: str) -> None:
    buffers = BatchBuffers()
    lent = buffers.take(4096)
    lent.fill_(7)
    held = {
        "itself": lent,
        "a part": lent[100:200],
        "a view of other type": lent.view(torch.float16).as_strided((4, 4), (4, 1), 8).permute(1, 0),
        "its numpy array": lent.numpy(),
        "a part of that": lent.numpy()[5:9],
    }[kept]
    before = torch.as_tensor(held).clone()
    del lent
    gc.collect()
    others = [buffers.take(4096).fill_(1) for _ in range(20)]
    assert torch.equal(torch.as_tensor(held), before), f"{len(others)} batches were lent since"


def test_few_returned_buffers_are_kept() -> None:
    buffers = BatchBuffers(spare=2)
    lent = [buffers.take(2**20) for _ in range(5)]
    addresses = [x.data_ptr() for x in lent]
    lent.clear()
    again = [buffers.take(2**20) for _ in range(2)]
    assert {x.data_ptr() for x in again} <= set(addresses)
    buffers.take(2**22)
    assert len(buffers._all) == len(again) + buffers.spare
    with pytest.raises(ValueError, match="at least one spare buffer, got 0"):
        BatchBuffers(spare=0)


def test_many_threads_never_share_a_buffer() -> None:
    buffers = BatchBuffers(spare=2)

    def use(number: int) -> bool:
        for turn in range(200):
            lent = buffers.take(64 + 8 * (turn % 5))
            lent.fill_(number)
            if not bool((lent == number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(4)))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_batch_changes_while_it_is_in_use_however_far_the_loader_is_ahead(
    tmp_path: Path, dataset: PackedDataset, views: ViewTable, prefetch: int
) -> None:
    """Every second batch is held to the end, the others are let go: their memory serves again."""
    key = tiny_key(dataset, views, codecs=("fp32", "int8_position", "fp16"))
    write(tmp_path, key, dataset, views)
    cache = TeacherCache.open(tmp_path, key)
    order = order_of(dataset, views, seed=0, batch=4, window=2)
    held, addresses = [], []
    with Loader(dataset, views, order, world=World(), caches={"big": cache}, prefetch=prefetch) as loader:
        for step, (batch,) in enumerate(islice(loader, 12)):
            taps = batch.cached["big"]
            assert taps.c5 is not None
            addresses.append(taps.c5.values.untyped_storage().data_ptr())
            if step % 2:
                held.append((order.global_batch(step)[1].tolist(), batch.views, taps))
            del batch, taps
    assert len(set(addresses)) < len(addresses), "no memory was used again"
    plain = TeacherCache.open(tmp_path, key, verify="never")
    for positions, shown, taps in held:
        expected = read(plain, positions, list(shown))
        assert all(torch.equal(a, b) for a, b in zip(tensors(taps.decode()), expected, strict=True))


def test_only_so_many_files_stay_mapped_and_what_was_read_from_them_stays(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset
) -> None:
    cache = TeacherCache.open(cache_folder, key, open_shards=2)
    first = cache.read([0], [0])
    kept = [x.clone() for x in tensors(first.decode())]
    for position in range(len(dataset)):
        cache.read([position], [1])
        assert len(cache.shards) <= 2
    assert all(torch.equal(a, b) for a, b in zip(tensors(first.decode()), kept, strict=True))
    used = [number for number, _ in cache.shards._open.items()]
    cache.shards.shard(used[0])
    assert list(cache.shards._open) == used[::-1], "the one that was used last goes last"
    with pytest.raises(ValueError, match="at least one open shard, got 0"):
        TeacherCache.open(cache_folder, key, open_shards=0)


@pytest.mark.parametrize("verify", ["first", "always"])
def test_several_threads_read_what_one_reads(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset, verify: str
) -> None:
    alone = TeacherCache.open(cache_folder, key)
    expected = [[x.clone() for x in read(alone, [i], [i % 2])] for i in range(len(dataset))]
    cache = TeacherCache.open(cache_folder, key, verify=verify, open_shards=2)  # type: ignore[arg-type]  # a parameter

    def look(turn: int) -> bool:
        position = turn * 5 % len(dataset)
        cache.bring([(position + 1) % len(dataset)], [0])
        found = read(cache, [position], [position % 2])
        return all(torch.equal(a, b) for a, b in zip(found, expected[position], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(200)))
    cache.close()


@pytest.mark.parametrize("worth", [0, 2**40], ids=["prepared by a thread", "prepared by the reader"])
@pytest.mark.parametrize("verify", ["always", "never"])
def test_what_was_brought_is_what_is_read(
    cache_folder: Path, key: CacheKey, views: ViewTable, verify: Any, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "WORTH_A_THREAD", worth)
    cache, plain = (TeacherCache.open(cache_folder, key, verify=verify) for _ in range(2))
    positions = one_canvas(views, 1)
    halves = [positions[: len(positions) // 2], positions[len(positions) // 2 :]]
    for _ in range(2):  # pages are there the second time
        reads = [cache.bring(half, [1] * len(half)) for half in halves]
        for half, read_brought in zip(halves, reads, strict=True):
            found, expected = read_brought(), plain.read(half, [1] * len(half))
            assert all(map(torch.equal, tensors(found.decode()), tensors(expected.decode())))
    cache.close()


def test_pages_that_are_expected_are_brought_in_once(cache_folder: Path, key: CacheKey, views: ViewTable) -> None:
    asked: list[tuple[int, int, int]] = []

    def advise(address: int, length: int, advice: int) -> int:
        asked.append((address, length, advice))
        return madvise(address, length, advice)

    cache = TeacherCache.open(cache_folder, key)
    cache._pages = Pages(advise)
    positions = one_canvas(views, 0)[:2]
    for _ in range(3):
        cache.bring(positions, [0, 0])
    cache._bringing.shutdown(wait=True)
    populated = [(address, length) for address, length, advice in asked if advice == MADV_POPULATE_READ]
    assert len(populated) == len(set(populated)) == 2
    assert all(address % mmap.PAGESIZE == 0 for address, _ in populated)
    row = cache._rows(cache.index.lines(positions, [0, 0]))[0]
    begin, end = row.values.ctypes.data, row.values.ctypes.data + len(row.values)
    assert any(address <= begin and end <= address + length for address, length in populated)


def test_a_damaged_file_is_told_to_whoever_reads_it_not_to_whoever_expects_it(
    cache_folder: Path, key: CacheKey
) -> None:
    cache = TeacherCache.open(cache_folder, key)
    for path in cache_folder.glob("v*/*.arrow"):
        path.write_bytes(bytes(100))
    read = cache.bring([0], [0])
    cache._bringing.shutdown(wait=True)
    with pytest.raises(ShardCorrupt, match="got 100 bytes"):
        read()
    with pytest.raises(IndexError, match="has no image"):
        cache.bring([10_000], [0])


def test_a_kernel_that_cannot_populate_is_named_once_and_pages_are_touched() -> None:
    refused = []

    def advise(address: int, length: int, advice: int) -> int:
        refused.append(advice)
        return errno.EINVAL if advice == MADV_POPULATE_READ else 0

    pages, memory = Pages(advise), np.ones(3 * mmap.PAGESIZE, np.uint8)
    with pytest.warns(UserWarning, match="Linux 5.14"):
        pages.bring(memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pages.bring(memory[5:])
        pages.bring(memory[:0])
    assert refused.count(MADV_POPULATE_READ) == 1
    assert "argument" in pages.why_touching


def test_population_maps_the_pages_of_a_file(tmp_path: Path) -> None:
    """Asked of the kernel itself, which lists how much of a mapping is there."""
    size = 64 * mmap.PAGESIZE
    (tmp_path / "file").write_bytes(bytes(size))
    with (tmp_path / "file").open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
        assert resident(mapped) == 0
        Pages().bring(mapped[10:-10])
        assert resident(mapped) == size


def resident(mapped: np.ndarray) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{mapped.ctypes.data:x}-"))
    return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024


@pytest.mark.parametrize(
    ("codecs", "enlarged"),
    [
        (("fp16", "fp32", "int8_channel"), None),
        (("sparse_position", "int8_position", "sparse_channel"), 1.2),
        (("sparse_channel", "fp16", "sparse_position"), 1.2),
    ],
)
def test_the_hash_of_a_copy_is_that_of_the_sample_which_the_writer_took(
    tmp_path: Path, dataset: PackedDataset, views: ViewTable, codecs: tuple[str, ...], enlarged: float | None
) -> None:
    """The one goes piece by piece through the batch, several pieces to a tap; the other tap by tap."""
    key = tiny_key(dataset, views, codecs=codecs, enlarged=enlarged, channels=(9, 700, 3))
    write(tmp_path, key, dataset, views)
    assert key.sample_bytes((256, 128)) > 2 * CHUNK or key.sparse
    cache = TeacherCache.open(tmp_path, key, verify="always")
    for view in range(2):
        positions = one_canvas(views, view)
        assert all(torch.isfinite(x).all() for x in read(cache, positions, [view] * len(positions)))


@pytest.mark.parametrize("part", ["scales", "masks", "values"])
def test_bytes_that_change_after_a_row_was_read_are_noticed_where_every_read_is_checked(
    tmp_path: Path, dataset: PackedDataset, views: ViewTable, part: str
) -> None:
    key = tiny_key(dataset, views, codecs=("sparse_position", "int8_channel", "sparse_channel"), enlarged=1.2)
    write(tmp_path, key, dataset, views)
    cache = TeacherCache.open(tmp_path, key, verify="always")
    for position in range(len(dataset)):
        (line,) = cache.index.lines([position], [0])
        (row,), path = cache._rows([line]), Path(cache.files[cache.index.places[line][0]].path)
        content, stretch = bytearray(path.read_bytes()), getattr(row, part)
        if content.count(stretch.tobytes()) != 1:
            continue  # not of this sample alone
        cache.read([position], [0])
        content[content.find(stretch.tobytes()) + len(stretch) // 2] ^= 4
        with path.open("r+b") as opened:  # the file that is mapped, not a new one of its name
            opened.write(content)
        with pytest.raises(ShardCorrupt, match="expected xxh3_64") as caught:
            cache.read([position], [0])
        assert caught.value.key == (int(dataset.image_ids[position]), 0)
        return
    pytest.fail("no sample has such bytes")


def test_neighbours_of_one_codec_and_width_are_read_together_and_the_last_stage_alone(
    tmp_path: Path, dataset: PackedDataset, views: ViewTable
) -> None:
    """Whatever is read together, the maps are those of the same taps read one by one."""
    names, strides = ("c5", "p3", "p4", "p5"), (32, 8, 16, 32)
    expected = {
        ("sparse_channel",) * 4: [1, 3],
        ("sparse_position", "sparse_position", "sparse_channel", "sparse_channel"): [1, 1, 2],
        ("int8_position",) * 4: [1, 3],
        ("fp32", "fp32", "sparse_channel", "fp32"): [1, 1, 1, 1],
    }
    for codecs, counts in expected.items():
        enlarged = 1.2 if any(name.startswith("sparse") for name in codecs) else None
        key = tiny_key(dataset, views, taps=names, channels=(3,) * 4, strides=strides, codecs=codecs, enlarged=enlarged)
        assert [group.count for group in key.groups] == counts
        write(tmp_path / str(len(list(tmp_path.iterdir()))), key, dataset, views)
        cache = TeacherCache.open(max(tmp_path.iterdir()), key)
        positions = one_canvas(views, 0)
        together = tensors(cache.read(positions, [0] * len(positions)).decode())
        assert len(together) == 4
        for row, position in enumerate(positions.tolist()):
            alone = read(cache, [position], [0])
            assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))
    odd = tiny_key(dataset, views, taps=("p3", "p4"), channels=(3, 4), strides=(8, 16), codecs=("fp16", "fp16"))
    assert [group.count for group in odd.groups] == [1, 1]
