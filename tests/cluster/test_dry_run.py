"""What a dry run tells of a cache: measured figures, every codec that the methods can read, and nothing left behind."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import packing
from cluster.config import RunConfig, load, to_tree
from cluster.precompute import dry_run
from cluster.precompute.dry_run import Forecast, Offer, measured, rows, told
from cluster.precompute.keys import cache_key
from cluster.precompute.probe import Speeds, disk_speed
from data_sharding.cache.cost import break_even
from data_sharding.cache.plan import estimate_bytes
from tests.cluster.test_build import TAUGHT
from tests.cluster.test_scoring import SMALL
from tests.end_to_end.commands import save_teacher


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed images and a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    save_teacher(folder / "weights")
    packing.pack_splits(recipe(folder))
    dry_run.build.open_train(recipe(folder))  # draws the views
    return folder


def recipe(storage: Path, **more: Any) -> RunConfig:
    settings = {"storage": str(storage), "teachers.0.weights": str(storage / "weights")}
    return load("digits_scalekd", TAUGHT | settings | more)


def masked(storage: Path) -> RunConfig:
    """Learns from foreground alone."""
    settings = {"storage": str(storage), "teachers.0.weights": str(storage / "weights")}
    return load("digits_scalekd", SMALL | settings | {"distill": {"fitnet": {"foreground": True}}})


def forecast(config: RunConfig, **more: Any) -> Forecast:
    config = replace(config, resources=replace(config.resources, threads=torch.get_num_threads()))
    return measured(to_tree(config), "teacher", **{"seconds": 0.0, "students": 1, "beside": 1, "writers": 1} | more)


def test_every_codec_that_the_methods_read_is_measured_and_nothing_is_left(storage: Path) -> None:
    before = sorted(storage.rglob("*"))
    found = forecast(recipe(storage))
    assert sorted(storage.rglob("*")) == before
    assert [offer.codec for offer in found.offers] == ["fp32", "fp16", "int8"]
    assert found.refused == {"sparse": "scalekd reads the whole map"}
    sizes = {offer.codec: offer.bytes for offer in found.offers}
    assert sizes["fp32"] > sizes["fp16"] > sizes["int8"]
    assert found.samples == 8
    assert min(found.speeds.teacher, found.speeds.step, found.speeds.write, found.speeds.read) > 0
    table = rows(found)
    assert [row["codec"] for row in table] == ["no cache", "fp32", "fp16", "int8", "sparse"]
    assert table[-1]["pays after"] == "cannot: scalekd reads the whole map"
    assert all(row.keys() == table[0].keys() for row in table[:-1])


def test_methods_that_read_foreground_are_offered_sparse_in_the_size_that_is_written(storage: Path) -> None:
    found = forecast(masked(storage))
    sizes = {offer.codec: offer.bytes for offer in found.offers}
    assert list(sizes) == ["fp32", "fp16", "int8", "sparse"]
    assert not found.refused
    assert sizes["sparse"] < 0.8 * sizes["int8"]
    config = masked(storage)
    train, student = dry_run.build.open_train(config), dry_run.build.build_student(config, 10)
    teacher = dry_run.build.load_teacher(config.teachers[0], train.dataset.categories)
    key = cache_key(config, teacher, student.shapes, train)
    assert sizes["fp32"] == estimate_bytes(key, train.dataset, train.views), "the recipe's own codec"


def offer(codec: str, size: int, *, teacher: float = 1.0, read: float = 1e9, fits: str = "") -> Offer:
    cost = break_even(
        student_seconds=0.1, teacher_seconds=teacher, bytes_per_image=size, read_bandwidth=read, write_bandwidth=read,
        gpus=1, epochs=10,
    )  # fmt: skip
    return Offer(codec=codec, bytes=size * 100, cost=cost, fits=fits)


def found(*offers: Offer) -> Forecast:
    speeds = Speeds(teacher=1.0, step=0.1, write=1e9, read=1e9)
    return Forecast(teacher="big", speeds=speeds, samples=100, views=1, writers=2, offers=offers, refused={})


def test_the_smallest_of_equally_fast_codecs_that_fit_is_advised() -> None:
    both = found(offer("fp16", 10_000), offer("int8", 5_000))
    assert both.best.codec == "int8"
    assert "best is codec int8. The cache pays" in told(both)
    cramped = found(offer("fp16", 10_000), offer("int8", 5_000, fits="no room"))
    assert cramped.best.codec == "fp16"
    assert "no codec fits on this disk: no room" in told(found(offer("int8", 5_000, fits="no room")))


def test_a_cache_that_reads_slower_than_the_teacher_looks_is_advised_against() -> None:
    slow = found(offer("fp16", 1_000_000, teacher=0.01, read=1e6))
    assert slow.offers[0].cost.epochs_to_pay == math.inf
    assert rows(slow)[1]["pays after"] == "never"
    assert "best is no cache (teachers.N.cache=false)" in told(slow)


def test_filling_is_shared_by_the_writers_and_pays_after_so_many_epochs() -> None:
    line = rows(found(offer("int8", 5_000)))[1]
    assert line["minutes to fill"] == pytest.approx(100 * 1.0 / 2 / 60)
    assert line["pays after"] == "1 epochs"
    assert line["speed"] == pytest.approx(11, rel=1e-3)


def test_disks_are_measured_with_a_file_that_goes_away(tmp_path: Path) -> None:
    write, read = disk_speed(tmp_path, 0.0)
    assert write > 1e5
    assert read > 1e5
    assert not list(tmp_path.iterdir())
