"""A teacher cache behind a URL gives what the same cache in a folder gives, or an error."""

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_sharding.batch import Batch
from data_sharding.cache.key import CacheKey, ForeignCache
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.rows import ShardCorrupt
from data_sharding.cache.writer import CacheIncomplete
from data_sharding.loader import Loader, order_of
from data_sharding.look_ahead import LookAhead
from data_sharding.order import Order, view_of
from data_sharding.publish import publish
from data_sharding.remote import Remote
from data_sharding.shards import PackedDataset
from data_sharding.staging import SourceCorrupt, Staging
from data_sharding.views import ViewTable
from data_sharding.world import World
from tests.data_sharding.test_cache_damage import flip, rows_of, shard_files
from tests.data_sharding.tiny import read, tensors

ROOMY = 10**9


@pytest.fixture(scope="session")
def stored() -> str:
    """One kind of cache: staging knows bytes, not taps."""
    return "fp16"


@pytest.fixture
def url(cache_folder: Path) -> str:
    return f"file://{cache_folder}"


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "local", ROOMY)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    count: Counter[str] = Counter()
    real = Remote.fetch

    def fetch(self: Remote, name: str, target: Path) -> None:
        real(self, name, target)
        count[name] += 1

    monkeypatch.setattr(Remote, "fetch", fetch)
    return count


def maps(batch: Batch) -> list[torch.Tensor]:
    return tensors(batch.cached["t"].decode())


def require_same(found: TeacherCache, expected: TeacherCache, images: int) -> None:
    for view in range(2):
        for i in range(images):
            pairs = zip(read(found, [i], [view]), read(expected, [i], [view]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_a_url_without_a_finished_cache_says_so(tmp_path: Path, key: CacheKey, url: str, staging: Staging) -> None:
    with pytest.raises(CacheIncomplete, match=f"file://{tmp_path}/nothing holds no finished teacher cache"):
        TeacherCache.open(f"file://{tmp_path}/nothing", key, staging=staging)
    with pytest.raises(ValueError, match="give `staging` a folder and a limit"):
        TeacherCache.open(url, key)
    with pytest.raises(ForeignCache, match=f"{url} was made with other settings"):
        TeacherCache.open(url, replace(key, teacher="other"), staging=staging)


@pytest.mark.parametrize("limit", [ROOMY, 40_000])
def test_it_reads_the_same_however_little_is_kept(
    tmp_path: Path, cache_folder: Path, url: str, key: CacheKey, dataset: PackedDataset, limit: int
) -> None:
    near, far = (
        TeacherCache.open(cache_folder, key),
        TeacherCache.open(url, key, staging=Staging(tmp_path / "s", limit)),
    )
    sent = pickle.loads(pickle.dumps(far))
    for cache in (far, sent):
        require_same(cache, near, len(dataset))
        assert sum(p.stat().st_size for p in (tmp_path / "s").iterdir() if p.is_file()) <= limit
        cache.close()


def test_a_cache_is_published_with_its_manifest_last_and_each_shard_once(
    tmp_path: Path, cache_folder: Path, key: CacheKey, dataset: PackedDataset, staging: Staging
) -> None:
    target = Remote("memory://bucket/caches/one")
    told: list[tuple[int, int]] = []
    publish(cache_folder, target, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(target.sizes().values())
    assert list(target.sizes()) == sorted(p for p in target.sizes() if "receipts" not in p)
    require_same(
        TeacherCache.open(target.url, key, staging=staging), TeacherCache.open(cache_folder, key), len(dataset)
    )
    sent: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "put", lambda self, source, name: sent.append(name))
        publish(cache_folder, target)
    assert sent == ["index.arrow", "key.json", "manifest.json"]


def test_a_file_that_is_cut_or_missing_at_the_source_is_told_before_a_sample_is_read(
    cache_folder: Path, url: str, key: CacheKey, staging: Staging
) -> None:
    path = shard_files(cache_folder)[2]
    content = path.read_bytes()
    for damage in (content[:-1], b"", content + b"x"):
        path.write_bytes(damage)
        with pytest.raises(SourceCorrupt, match=f"{path.name}: expected {len(content)} bytes, got {len(damage)} bytes"):
            TeacherCache.open(url, key, staging=staging)
    path.unlink()
    with pytest.raises(SourceCorrupt, match=f"{path.name}.*no such file"):
        TeacherCache.open(url, key, staging=staging)


def test_every_flipped_byte_at_the_source_is_told_when_the_file_is_staged(
    cache_folder: Path, url: str, key: CacheKey, dataset: PackedDataset, staging: Staging
) -> None:
    path = shard_files(cache_folder)[0]
    ((image_id, view), *_) = rows_of(path)[0]
    position = int(np.flatnonzero(dataset.image_ids == image_id)[0])
    random = np.random.Generator(np.random.Philox(3))
    cache = TeacherCache.open(url, key, staging=staging)
    for at in random.integers(0, path.stat().st_size, 100):
        flip(path, int(at))
        with pytest.raises(SourceCorrupt, match=f"file://{path}: expected .* with xxh3_128 .*, got xxh3_128"):
            cache.read([position], [view])
        flip(path, int(at))
    assert not [p for p in staging.folder.iterdir() if p.is_file()], "a damaged file is never put into place"
    cache.read([position], [view])


@pytest.mark.parametrize("when", ["while it is mapped", "before the process began"])
def test_a_damaged_copy_is_healed_once_and_no_other_sample_is_given(
    cache_folder: Path, url: str, key: CacheKey, dataset: PackedDataset, staging: Staging, fetched: Any, when: str
) -> None:
    near, far = TeacherCache.open(cache_folder, key), TeacherCache.open(url, key, staging=staging, verify="always")
    path = shard_files(cache_folder)[0]
    name = path.relative_to(cache_folder).as_posix()
    (image_id, view), start, _ = rows_of(path)[0]
    position = int(np.flatnonzero(dataset.image_ids == image_id)[0])
    far.read([position], [view])
    copy = staging.folder / name.replace("/", "-")
    with copy.open("r+b") as file:  # in place, as a failing disk does it
        file.seek(start)
        byte = file.read(1)[0]
        file.seek(start)
        file.write(bytes([byte ^ 4]))
    if when == "before the process began":
        far.close()
        far = TeacherCache.open(url, key, staging=staging)
    assert all(
        torch.equal(a, b) for a, b in zip(read(far, [position], [view]), read(near, [position], [view]), strict=True)
    )
    assert fetched[name] == 2
    assert copy.read_bytes() == path.read_bytes()


def test_a_sample_that_disagrees_with_the_index_at_the_source_too_is_an_error(
    cache_folder: Path, url: str, key: CacheKey, staging: Staging, fetched: Any
) -> None:
    cache = TeacherCache.open(url, key, staging=staging)
    cache.index.columns["checksum"] = cache.index.columns["checksum"] ^ 1
    with pytest.raises(ShardCorrupt, match=r"row 0, \(image id, view\) .* expected xxh3_64"):
        cache.read([int(cache.index.columns["position"][0])], [int(cache.index.columns["view"][0])])


def test_the_loader_gives_the_same_batches_within_the_limit(
    tmp_path: Path, cache_folder: Path, url: str, key: CacheKey, dataset: PackedDataset, views: ViewTable, fetched: Any
) -> None:
    order = order_of(dataset, views, seed=5, batch=2, window=1)
    near, alone = TeacherCache.open(cache_folder, key), World(rank=0, size=1)
    staging = Staging(tmp_path / "s", 9 * sum(file.bytes for file in near.files) // 10)
    far = TeacherCache.open(url, key, staging=staging)
    with (
        Loader(dataset, views, order, world=alone, caches={"t": near}, prefetch=1) as expected,
        Loader(dataset, views, order, world=alone, caches={"t": far}, prefetch=1, ahead=2) as found,
    ):
        for _ in range(order.step_of(4)):
            (a,), (b,) = next(found), next(expected)
            assert a.image_ids == b.image_ids
            assert all(torch.equal(x, y) for x, y in zip(maps(a), maps(b), strict=True))
            assert sum(p.stat().st_size for p in staging.folder.iterdir() if p.is_file()) <= staging.limit
    far.close()
    assert set(fetched) == {p.relative_to(cache_folder).as_posix() for p in shard_files(cache_folder)}


@pytest.mark.parametrize(("rank", "start"), [(0, 0), (1, 0), (1, 9)])
def test_what_is_kept_and_fetched_follows_from_the_order_alone(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable, rank: int, start: int
) -> None:
    order = order_of(dataset, views, seed=5, batch=2, window=1)
    cache, world, told = TeacherCache.open(cache_folder, key), World(rank=rank, size=2), dict[str, list[int]]()
    cache.keep = lambda shards: told.update(kept=list(shards))  # type: ignore[method-assign]  # a spy
    cache.expect = lambda shards: told.update(expected=list(shards))  # type: ignore[method-assign]  # a spy
    plan = LookAhead(cache, order, views.count, world, shards=2, behind=1, groups=dataset.groups)
    steps = order.step_of(4)
    used = [_shard(cache, order, dataset, views, world, step) for step in range(steps)]
    epoch_of = [order.position(step)[0] for step in range(steps)]
    for step in range(start, order.step_of(3)):
        plan.at(step)
        behind = used[max(start, step - 1) : step]
        assert {used[step], *behind} <= set(told["kept"])
        assert used[step] in told["expected"]
        next_ones = list(dict.fromkeys(used[step:]))[:3]
        assert set(next_ones) <= set(told["expected"]), "the one of now and two more"
        over = set(told["kept"]) - set(used[max(0, step - 1) : order.step_of(epoch_of[step] + 2)])
        assert not over, "what was read for the last time is let go"
        assert len(told["expected"]) <= len(_alive(used, epoch_of, step)) + 2


def _alive(used: list[int], epoch_of: list[int], step: int) -> set[int]:
    """What was read in this epoch, now or one step ago or before, and is read now, then or later in it."""
    epoch = [i for i in range(len(used)) if epoch_of[i] == epoch_of[step]]
    return {used[i] for i in epoch if i <= step} & {used[i] for i in epoch if i >= step - 1}


def _shard(cache: TeacherCache, order: Order, dataset: PackedDataset, views: ViewTable, world: World, step: int) -> int:
    epoch, row = order.global_batch(step)
    mine = order.rank_rows(row, world)
    (shard,) = cache.index.shards(mine, view_of(dataset.groups[mine], epoch, views.count))
    return int(shard)


def test_an_order_that_needs_more_at_one_time_than_the_limit_is_refused_with_what_to_set(
    tmp_path: Path, url: str, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    cache = TeacherCache.open(url, key, staging=Staging(tmp_path / "s", 13_000))
    order = order_of(dataset, views, seed=5, batch=2)
    with pytest.raises(ValueError, match=r"and resources.staging_gb is 1.3e-05.*lower order.window \(now 16\)"):
        Loader(dataset, views, order, world=World(rank=0, size=1), caches={"t": cache})
