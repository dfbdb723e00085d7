"""One override lets a run read its teacher cache from elsewhere: it is filled, copied up and read by staging."""

from pathlib import Path

import pytest
import torch

from cluster import build, packing
from cluster.config import RunConfig, load, to_tree
from cluster.grammar import from_arguments
from cluster.precompute import filling as caching
from cluster.precompute.filling import ShardWriter
from cluster.teaching import open_teachers
from data_sharding.loader import Loader
from data_sharding.staged_shards import StagedShards
from data_sharding.world import World
from tests.end_to_end.commands import SMALL_DATA, SMALL_STUDENT, save_teacher


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    settings = [
        *SMALL_DATA,
        *SMALL_STUDENT,
        f"storage={tmp_path / 'runs'}",
        f"teachers.0.weights={save_teacher(tmp_path / 'teacher')}",
        'distill.scalekd.sdf={"width":16,"token_width":16}',
        'distill.scalekd.csa={"heads":2}',
        "resources.caches=memory://shelf/far",
        f"resources.staging={tmp_path / 'copies'}",
    ]
    return load("digits_scalekd", from_arguments(settings))


def test_a_run_reads_from_elsewhere_what_was_filled_below_its_storage(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_here(config: RunConfig, teacher: str, pending: list[tuple[int, int]], *_: object) -> None:
        writer = ShardWriter(to_tree(config), teacher)
        for number, _samples in pending:
            writer({"shard": [number]})  # type: ignore[dict-item]  # a list, for an array

    monkeypatch.setattr(caching, "_run_writers", write_here)  # as Ray's actors do
    monkeypatch.setattr(caching, "_announce", lambda *_: None)
    packing.pack_splits(config)
    (filled,) = caching.fill_caches(config).values()
    assert str(filled.place).startswith("memory://shelf/far/teacher-")
    assert filled.bytes > 0
    (again,) = caching.fill_caches(config).values()
    assert (again.place, again.seconds) == (filled.place, 0.0)

    train = build.open_train(config)
    student = build.build_student(config, len(train.dataset.categories)).shapes
    staff = open_teachers(config, student, train, torch.device("cpu"))
    (cache,) = staff.caches.values()
    assert isinstance(cache.shelf, StagedShards)
    order, alone = build.build_order(config, train), World(rank=0, size=1)
    with Loader(train.dataset, train.views, order, world=alone, caches=staff.caches) as loader:
        for _ in range(order.step_of(1)):
            (batch,) = next(loader)
            taps = staff.teachers["teacher"](batch)
            assert taps.c5 is not None or taps.pyramid
    copies = [path for path in (tmp_path / "copies").iterdir() if path.is_file()]
    assert copies
    assert sum(path.stat().st_size for path in copies) <= cache.files[0].bytes * len(cache.files) * 2
    cache.close()
