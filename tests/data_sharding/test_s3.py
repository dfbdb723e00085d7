"""A teacher cache in an object store, by the real protocol, on a server that fails as real ones do: nothing is lost."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.cache.key import CacheKey
from data_sharding.cache.reader import TeacherCache
from data_sharding.loader import Loader, order_of
from data_sharding.publish import publish
from data_sharding.remote import Remote
from data_sharding.shards import PackedDataset
from data_sharding.staging import SourceCorrupt, Staging
from data_sharding.views import ViewTable
from data_sharding.world import World
from tests.data_sharding.s3_server import Faulty, s3
from tests.data_sharding.test_far_cache import maps, stored

__all__ = ["s3", "stored"]
URL = "s3://shelf/caches/arithmetic"


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_sharding.remote.time.sleep", lambda seconds: None)


def test_training_from_an_object_store_that_fails_sees_every_sample_as_it_was_written(
    s3: Faulty, tmp_path: Path, cache_folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    publish(cache_folder, Remote(URL))
    staging = Staging(tmp_path / "local", 80_000)
    near, far = TeacherCache.open(cache_folder, key), TeacherCache.open(URL, key, staging=staging)
    order, alone = order_of(dataset, views, seed=5, batch=2, window=1), World(rank=0, size=1)
    s3.plan += ["500", "cut", "slow down", "served", "500", "500", "stall", "cut", "cut", "served", "slow down", "500"]
    planned = len(s3.plan)
    with (
        Loader(dataset, views, order, world=alone, caches={"t": near}, prefetch=1) as expected,
        Loader(dataset, views, order, world=alone, caches={"t": far}, prefetch=1, ahead=2) as found,
    ):
        for _ in range(order.step_of(2)):
            (a,), (b,) = next(found), next(expected)
            assert a.image_ids == b.image_ids
            assert all(torch.equal(x, y) for x, y in zip(maps(a), maps(b), strict=True))
    far.close()
    assert s3.plan == []
    assert len(s3.done) > planned, "every fault befell a download"


def test_a_damaged_object_is_told_by_its_url_after_two_downloads(
    s3: Faulty, tmp_path: Path, cache_folder: Path, key: CacheKey
) -> None:
    publish(cache_folder, Remote(URL))
    cache = TeacherCache.open(URL, key, staging=Staging(tmp_path / "local", 10**9))
    name = cache.files[0].id
    damaged = bytearray(Path(TeacherCache.open(cache_folder, key).files[0].path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    Remote(URL).put(tmp_path / "damaged", str(cache.files[0].path).removeprefix(f"{URL}/"))
    line = int(np.flatnonzero(cache.index.columns["shard"] == 0)[0])
    s3.done.clear()
    with pytest.raises(SourceCorrupt, match=f"{URL}/{name}.*with xxh3_128 {cache.files[0].xxh3_128}, got xxh3_128"):
        cache.read([int(cache.index.columns["position"][line])], [int(cache.index.columns["view"][line])])
    assert s3.done == ["served", "served"]
    cache.close()


def test_a_missing_bucket_is_named(s3: Faulty, tmp_path: Path, key: CacheKey) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match="s3://nobody/caches"):
        TeacherCache.open("s3://nobody/caches", key, staging=Staging(tmp_path / "local", 100))
