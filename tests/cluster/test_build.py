"""A run's objects follow from its recipe, and what cannot work is refused before a step, in plain words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import build, gate, packing
from cluster.config import RunConfig, check, load, to_tree
from cluster.grammar import ConfigError
from cluster.scoring import ground_truth
from data_sharding.world import World
from kd import student
from tests.cluster.test_scoring import SMALL
from tests.end_to_end.commands import save_teacher

TAUGHT = SMALL | {"distill.scalekd.sdf": {"width": 16, "token_width": 16}, "distill.scalekd.csa": {"heads": 2}}


def recipe(storage: Path, teacher: Path, **more: Any) -> RunConfig:
    settings = {"storage": str(storage), "teachers.0.weights": str(teacher), "teachers.0.gate_images": 4}
    return load("digits_scalekd", TAUGHT | settings | more)


def test_data_that_is_not_packed_is_told_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split 'train' is not packed yet; run `python -m cluster\.pack`"):
        build.open_train(recipe(tmp_path, tmp_path))


def test_the_student_is_the_same_with_and_without_methods(tmp_path: Path) -> None:
    taught = recipe(tmp_path, tmp_path)
    plain = replace(taught, distill={}, teachers=())

    torch.manual_seed(1)
    first = build.build_student(taught, 10).state_dict()
    torch.manual_seed(2)
    second = build.build_student(plain, 10).state_dict()
    third = build.build_student(replace(plain, seed=9), 10).state_dict()

    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, third[name]) for name, value in first.items())


def test_a_missing_teacher_is_told_with_what_to_set(tmp_path: Path) -> None:
    config = recipe(tmp_path, tmp_path / "nowhere")
    packed = packing.pack_splits(config)
    with pytest.raises(ConfigError, match=r"'teacher' is read from .*nowhere.* point teachers\.N\.weights"):
        build.load_teacher(config.teachers[0], packed["train"].categories)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    categories = packing.pack_splits(config)["train"].categories
    swapped = (categories[1], categories[0], *categories[2:])
    with pytest.raises(ConfigError, match=r"same in the same order \(0: data set '1', teacher '0'"):
        build.load_teacher(config.teachers[0], swapped)


def test_a_teacher_below_its_gate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"teachers.0.min_ap": 5.0})
    packing.pack_splits(config)
    monkeypatch.setattr(gate, "_measured", lambda config, teacher: gate._score_teacher(to_tree(config), teacher.name))
    with pytest.raises(ConfigError, match=r"reaches AP \d\.\d on the first 4 .* at 2x, its gate is min_ap=5"):
        gate.require_good_teachers(config)


def test_every_lesson_has_its_own_weights_whatever_was_drawn_before(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    train = packing.pack_splits(config)["train"]
    shapes = build.build_student(config, 10).shapes
    teachers = {"teacher": build.load_teacher(config.teachers[0], train.categories)}

    first = build.build_lessons(config, shapes, teachers, World(), torch.device("cpu"))
    torch.rand(5)
    second = build.build_lessons(config, shapes, teachers, World(), torch.device("cpu"))

    assert list(first.lessons) == ["scalekd"]
    assert list(first.assistants) == ["scalekd"]
    for mine, its in (
        (first.lessons["scalekd"][1], second.lessons["scalekd"][1]),
        (first.assistants["scalekd"].assistant, second.assistants["scalekd"].assistant),
    ):
        other = its.state_dict()
        assert all(torch.equal(value, other[name]) for name, value in mine.state_dict().items())


def test_an_assistant_may_have_a_head_of_the_students_make(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"distill.scalekd.csa.head": "own"})
    train = packing.pack_splits(config)["train"]
    student = build.build_student(config, 10)
    teachers = {"teacher": build.load_teacher(config.teachers[0], train.categories)}
    taught = build.build_lessons(config, student.shapes, teachers, World(), torch.device("cpu"))
    own = taught.assistants["scalekd"].assistant.predictor(student)
    assert own is not student
    mine, its = ({n: p.shape for n, p in d.named_parameters() if n.startswith("head.")} for d in (own, student))
    assert mine == its


def test_the_cache_key_names_what_decides_its_bytes(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    packing.pack_splits(config)
    train = build.open_train(config)
    teacher = build.load_teacher(config.teachers[0], train.dataset.categories)
    shapes = build.build_student(config, 10).shapes

    key = build.cache_key(config, teacher, shapes, train)
    again = build.cache_key(check(to_tree(config), "again"), teacher, shapes, train)

    assert key == again
    assert key.taps == ("c5", "p3", "p4", "p5")
    assert key.strides == (32, 8, 16, 32)
    assert key.weights_sha256 == student.load(config.teachers[0].weights)[1].sha256
    pooled = check(to_tree(replace(config, teachers=(replace(config.teachers[0], align="pool"),))), "pooled")
    assert build.cache_folder(config, key) != build.cache_folder(
        pooled, build.cache_key(pooled, replace(teacher, config=pooled.teachers[0]), shapes, train)
    )


def test_the_labels_of_a_split_are_read_without_its_pixels(tmp_path: Path) -> None:
    config = recipe(tmp_path, tmp_path)
    packing.pack_splits(config)
    truth = ground_truth(build.open_val(config), first=3)
    assert len(truth.image_ids) == 3


def test_a_gate_that_no_node_can_hold_is_refused_instead_of_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray queues a task that needs more CPUs than there are for ever."""
    import ray

    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"resources.threads": 3})
    packing.pack_splits(config)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"resources: 1 worker\(s\) need 3 CPUs, the cluster has 2"):
        gate.require_good_teachers(config)
