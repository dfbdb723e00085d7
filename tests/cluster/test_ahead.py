"""Looking ahead of the writer changes when things happen, not what is written; nothing runs ahead without bound."""

import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from cluster.build import Split
from cluster.precompute.ahead import DEPTH, NICER, AheadOfWriting, give_way
from cluster.precompute.batches import Assembled
from data_sharding.batch import Batch, Taps
from data_sharding.cache.key import CacheKey
from data_sharding.cache.plan import CacheShard
from data_sharding.cache.writer import CacheWriter, Receipt, Seen, TapsOf
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from tests.data_sharding.tiny import content, tiny_dataset, tiny_key, tiny_taps, tiny_views


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    dataset = tiny_dataset(tmp_path_factory.mktemp("packed"))
    return Split(dataset=dataset, views=tiny_views(dataset))


class Teacher:
    """Tells from a batch's ids which images it is asked about; remembers how often and where."""

    def __init__(self, dataset: PackedDataset, views: ViewTable, key: CacheKey) -> None:
        self.positions = {int(image): i for i, image in enumerate(dataset.image_ids)}
        self.taps_of, self.looks, self.threads = tiny_taps(key, views), 0, set[str]()

    def __call__(self, batch: Batch) -> Taps:
        self.looks += 1
        self.threads.add(threading.current_thread().name)
        return self.taps_of(np.array([self.positions[i] for i in batch.image_ids]), batch.views[0])


def ahead_of(split: Split, look: object) -> AheadOfWriting:
    pixels = Assembled(split, 1, initializer=give_way)
    return AheadOfWriting(pixels, look, torch.device("cpu"))  # pyright: ignore[reportArgumentType]


def test_the_same_bytes_as_one_step_after_the_other(split: Split, tmp_path: Path) -> None:
    key = tiny_key(split.dataset, split.views)
    teacher = Teacher(split.dataset, split.views, key)
    writers = [CacheWriter(tmp_path / name, key, split.dataset, split.views) for name in ("ahead", "alone")]
    ahead = ahead_of(split, teacher)
    assert len(writers[0].shards) > 4
    ahead.fill(writers[0], [])
    ahead.fill(writers[0], writers[0].shards[:3])
    ahead.fill(writers[0], writers[0].shards[3:])
    ahead.close()
    assert teacher.looks == sum(len(shard.batches) for shard in writers[0].shards)
    assert teacher.threads == {threading.current_thread().name}
    with Assembled(split, 1) as pixels:

        def seen(positions: np.ndarray, view: int) -> Seen:
            batch = pixels.batch(positions, view)
            return Seen(teacher(batch), batch.images)

        for shard in writers[1].shards:
            writers[1].fill(shard, seen)
    for writer in writers:
        writer.finish()
    assert content(tmp_path / "ahead") == content(tmp_path / "alone")


class SlowWriter(CacheWriter):
    """Takes the next batch when the teacher is as far ahead of it as it can get."""

    def follow(self, teacher: Teacher) -> None:
        self.teacher, self.taken, self.most = teacher, 0, 0
        self.batches = sum(len(shard.batches) for shard in self.shards)

    def fill(self, shard: CacheShard, taps_of: TapsOf) -> Receipt:
        for batch in shard.batches:
            taps_of(np.array(batch), shard.view)
            self.taken += 1
            deadline = time.monotonic() + 60
            while self.teacher.looks < min(self.taken + DEPTH + 1, self.batches):
                assert time.monotonic() < deadline, "nobody looks ahead"
                time.sleep(0.001)
            time.sleep(0.02)  # enough to look once more, were that allowed
            self.most = max(self.most, self.teacher.looks - self.taken)
        return cast(Any, None)


def test_a_teacher_waits_for_a_slow_disk(split: Split, tmp_path: Path) -> None:
    """However long the writer takes, DEPTH batches wait for it and the teacher holds one: memory is bounded."""
    key = tiny_key(split.dataset, split.views)
    teacher = Teacher(split.dataset, split.views, key)
    ahead = ahead_of(split, teacher)
    slow = SlowWriter(tmp_path, key, split.dataset, split.views)
    slow.follow(teacher)
    ahead.fill(slow, slow.shards)
    ahead.close()
    assert teacher.looks == slow.taken == slow.batches
    assert slow.most == DEPTH + 1


def test_what_goes_wrong_in_any_thread_is_raised(split: Split, tmp_path: Path) -> None:
    key = tiny_key(split.dataset, split.views)

    def blind(batch: Batch) -> Taps:
        raise MemoryError("no room for activations")

    writer = CacheWriter(tmp_path, key, split.dataset, split.views)
    ahead = ahead_of(split, blind)
    with pytest.raises(MemoryError, match="no room for activations"):
        ahead.fill(writer, writer.shards)
    ahead.close()

    wrong = ahead_of(
        split, Teacher(split.dataset, split.views, tiny_key(split.dataset, split.views, channels=(5, 3, 4)))
    )
    with pytest.raises(ValueError, match="expected"):
        wrong.fill(writer, writer.shards)
    wrong.close()
    assert not list(tmp_path.glob("v*/*")), "nothing half written is left"


def test_only_helpers_give_way() -> None:
    found: list[int] = []

    def niced() -> None:
        give_way()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=niced)
    thread.start()
    thread.join()
    assert found == [min(19, before + NICER)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
