"""A recipe's codecs become a key: the same for everybody who opens the cache, once the open choices were measured."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster import build, packing
from cluster.build import LoadedTeacher, Split
from cluster.config import RunConfig, check, load, to_tree
from cluster.grammar import ConfigError
from cluster.precompute import keys as cache_keys
from cluster.precompute.filling import ShardWriter, actors_of
from cluster.precompute.keys import cache_folder, cache_key, choice_path, largest_key, settled_key
from cluster.teaching import open_teachers
from data_sharding.cache.key import CacheKey
from data_sharding.cache.writer import CacheWriter
from data_sharding.codecs.foreground import foreground_cells
from data_sharding.loader import Loader
from data_sharding.world import World
from kd.detectors.base import Shapes
from tests.cluster.test_scoring import SMALL
from tests.end_to_end.commands import save_teacher

MASKED = {"distill": {"fitnet": {"foreground": True}}}


@dataclass(frozen=True)
class Asked:
    config: RunConfig
    teacher: LoadedTeacher
    student: Shapes
    train: Split

    def key(self) -> CacheKey:
        """As a worker asks, from a recipe that has travelled."""
        return cache_key(check(to_tree(self.config), "again"), self.teacher, self.student, self.train)

    def settled(self) -> tuple[CacheKey, list[str]]:
        return settled_key(self.config, self.teacher, self.student, self.train)


Ask = Callable[..., Asked]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    storage = tmp_path_factory.mktemp("storage")
    return storage, save_teacher(storage / "weights")


@pytest.fixture
def ask(packed: tuple[Path, Path]) -> Ask:
    """A recipe with settings of its own, its teacher and its packed images."""

    def made(**more: Any) -> Asked:
        storage, weights = packed
        settings = {"storage": str(storage), "teachers.0.weights": str(weights)}
        config = load("digits_scalekd", SMALL | settings | {"distill": {"fitnet": {}}} | more)
        packing.pack_splits(config)
        train = build.open_train(config)
        teacher = build.load_teacher(config.teachers[0], train.dataset.categories)
        return Asked(config, teacher, build.build_student(config, 10).shapes, train)

    return made


def test_named_codecs_need_no_measuring_and_taps_may_differ(ask: Ask) -> None:
    asked = ask(**{"teachers.0.codec": "int8_position", "teachers.0.tap_codecs.p3": "fp16"})
    assert asked.key().taps == ("p3", "p4", "p5")
    assert asked.key().codecs == ("fp16", "int8_position", "int8_position")
    assert asked.key().enlarged is None
    assert asked.settled() == (asked.key(), [])


def test_what_int8_means_is_measured_once_and_then_the_same_for_all(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(**{"teachers.0.codec": "int8"})
    with pytest.raises(ConfigError, match=r"nobody has compared the codecs .*python -m cluster\.cache_teacher"):
        asked.key()
    key, told = asked.settled()
    assert len(told) == 3
    assert all(line.startswith(f"{tap} {codec} ") for line, tap, codec in zip(told, key.taps, key.codecs, strict=True))
    assert all(codec in ("int8_channel", "int8_position") for codec in key.codecs)
    monkeypatch.setattr(cache_keys, "compared", lambda *_: pytest.fail("measured twice"))
    assert asked.key() == key
    assert asked.settled() == (key, [])
    monkeypatch.undo()
    path = choice_path(asked.config, *largest_key(asked.config, asked.teacher, asked.student, asked.train))
    kept = path.read_bytes()
    path.unlink()
    assert asked.settled()[0] == key
    assert path.read_bytes() == kept, "measured again it is the same"


def test_the_answer_lies_beside_caches_behind_a_url(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another storage, as on another machine, asks it instead of measuring."""
    asked = ask(**{"teachers.0.codec": "int8", "resources.caches": f"file://{tmp_path}/far"})
    key, _ = asked.settled()
    assert len(list((tmp_path / "far/codecs").iterdir())) == 1
    elsewhere = check({**to_tree(asked.config), "storage": str(tmp_path / "other")}, "elsewhere")
    monkeypatch.setattr(cache_keys, "compared", lambda *_: pytest.fail("measured twice"))
    assert settled_key(elsewhere, asked.teacher, asked.student, asked.train) == (key, [])
    assert cache_key(elsewhere, asked.teacher, asked.student, asked.train) == key


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"codecs": ["fp16"] * 3}), json.dumps({"codecs": []})])
def test_a_damaged_answer_is_an_error_that_names_the_file(ask: Ask, content: str) -> None:
    asked = ask(**{"teachers.0.codec": "int8", "teachers.0.tap_codecs.p5": "fp32"})
    asked.settled()
    path = choice_path(asked.config, *largest_key(asked.config, asked.teacher, asked.student, asked.train))
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"{path.name} .*delete it to compare the codecs again"):
        asked.key()
    path.unlink()


def test_a_sparse_cache_holds_what_its_methods_read(ask: Ask) -> None:
    masked = ask(**MASKED, **{"teachers.0.codec": "sparse"})
    key, told = masked.settled()
    assert all(codec in ("sparse_channel", "sparse_position") for codec in key.codecs)
    assert key.enlarged == 1.2
    assert len(told) == 3
    wider = ask(**{"distill": {"fitnet": {"foreground": True, "enlarged": 1.5}}}, **{"teachers.0.codec": "sparse"})
    assert wider.settled()[0].enlarged == 1.5


def test_a_tap_that_is_not_stored_cannot_have_a_codec(ask: Ask) -> None:
    with pytest.raises(ConfigError, match=r"tap_codecs names c5, p7, but the taps .* read of it are p3, p4, p5"):
        ask(**{"teachers.0.tap_codecs": {"c5": "fp16", "p7": "fp16"}}).key()


def test_what_writers_fill_from_a_recipe_is_what_its_workers_read(ask: Ask) -> None:
    """Int8 of the live taps inside boxes, zeros outside."""
    asked = ask(**MASKED, **{"teachers.0.codec": "sparse"})
    config, train = asked.config, asked.train
    key, _ = asked.settled()
    writer = CacheWriter(cache_folder(config, key), key, train.dataset, train.views)
    ShardWriter(to_tree(config), "teacher")({"shard": np.arange(len(writer.shards))})
    writer.finish()
    staff = open_teachers(config, asked.student, train, torch.device("cpu"))
    order = build.build_order(config, train)
    factors = (config.teachers[0].factor,)
    live = build.live_teacher(asked.teacher, asked.student, build.reads_of(config))
    with Loader(train.dataset, train.views, order, world=World(), factors=factors, caches=staff.caches) as loader:
        (batch,) = next(loader)
    found, seen = staff.teachers["teacher"](batch).pyramid, live(batch).pyramid
    masks = foreground_cells(batch.boxes, batch.geometry.canvas, asked.student.strides, 1.2)
    for x, y, mask in zip(found, seen, masks, strict=True):
        kept = y * mask[:, None]
        assert 0 < kept.norm() <= y.norm()
        assert (x - kept).norm() < 0.02 * kept.norm()
        assert (x * ~mask[:, None] == 0).all()


@pytest.mark.parametrize(
    ("cluster", "gpu", "threads", "pending", "actors"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, True, 4, 1000, 8),
        ({"CPU": 64.0}, False, 4, 1000, 16),
        ({"CPU": 64.0}, False, 4, 3, 3),
        ({"CPU": 2.0}, False, 4, 3, 1),
    ],
)
def test_a_cache_is_filled_by_the_whole_cluster(
    cluster: dict[str, float], gpu: bool, threads: int, pending: int, actors: int
) -> None:
    assert actors_of(cluster, gpu, threads, pending) == actors
