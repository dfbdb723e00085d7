import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_sharding.cache.key import CacheKey
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheIncomplete, CacheWriter
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from tests.data_sharding.tiny import content, tiny_taps, write

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("writers", [2, 3, 50])
def test_any_number_of_writers_gives_the_same_bytes(
    tmp_path: Path, cache_folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable, writers: int
) -> None:
    write(tmp_path / "other", key, dataset, views, writers)
    assert content(tmp_path / "other") == content(cache_folder)


def test_writers_killed_anywhere_leave_a_cache_that_others_finish_with_the_same_bytes(
    tmp_path: Path, cache_folder: Path, stored: str, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    folder = tmp_path / "killed"
    drawn = random.Random(11)
    moments = drawn.choices(range(1, 70), k=26) + drawn.choices(range(150, 400), k=3)
    told = subprocess.run(
        [sys.executable, "-m", "tests.data_sharding.killed_writer", dataset.folder, folder, stored, *map(str, moments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split("\n").count("killed") >= 20, told.stdout
    assert not (folder / "manifest.json").exists()
    assert any(".tmp." in name for name in content(folder)), "a killed writer should have left something"
    written = sum(1 for name in content(folder) if name.startswith("receipts"))
    assert written > 0
    resumed = write(folder, key, dataset, views, writers=2)
    assert len(resumed.shards) > written or list(resumed.pending()) == []
    assert content(folder) == content(cache_folder)


def test_resuming_writes_only_what_is_missing(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    before = content(cache_folder)
    writer = CacheWriter(cache_folder, key, dataset, views)
    assert list(writer.pending()) == []
    lost = [writer.receipt(s) for s in writer.shards[:3]]
    names = [cache_folder / r.name for r in lost if r is not None]
    names[0].unlink()
    names[1].write_bytes(names[1].read_bytes()[:-5])
    (cache_folder / "receipts" / f"{writer.shards[2].id.replace('/', '-')}.json").write_text('{"id": ')
    assert [s.id for s in writer.pending()] == [s.id for s in writer.shards[:3]]
    with pytest.raises(CacheIncomplete, match=f"{len(writer.shards) - 3} of {len(writer.shards)} shards are written"):
        writer.finish()
    write(cache_folder, key, dataset, views)
    assert content(cache_folder) == before


def test_an_unfinished_cache_is_not_opened(
    tmp_path: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    with pytest.raises(CacheIncomplete, match=r"0 shards are written.*python -m cluster.cache_teacher"):
        TeacherCache.open(tmp_path / "nothing", key)
    writer = CacheWriter(tmp_path, key, dataset, views)
    writer.fill(writer.shards[0], tiny_taps(key, views))
    with pytest.raises(CacheIncomplete, match="1 shards are written"):
        TeacherCache.open(tmp_path, key)
